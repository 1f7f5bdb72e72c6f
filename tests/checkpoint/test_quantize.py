"""`kit quantize`: files in the published layouts, whose numbers are those that a trainer uses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from kit.checkpoint import manifest
from kit.checkpoint.quantize import PARTS, quantization_report, quantize
from kit.cli.app import app
from kit.config import ModelConfig, QuantizationConfig
from kit.errors import ConfigError, ModelError
from kit.models.low_precision import check_model, is_quantized, scheme_of
from kit.models.source import find
from kit.operators.low_precision import rounded_weight, unpack_int4
from kit.tiny import MODEL_DIR

INT4 = QuantizationConfig(method="int4", group_size=64)
FP8 = QuantizationConfig(method="fp8")


def files(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("config", [FP8, INT4])
def test_a_quantised_directory_reads_as_what_a_trainer_computes_with(
    config: QuantizationConfig, tmp_path: Path
) -> None:
    folder = quantize("tiny", tmp_path / "out", config)
    plain, there = files(MODEL_DIR), files(folder)
    scheme = scheme_of(config)
    quantised = [name for name in plain if is_quantized(name)]
    assert len(quantised) == 4 * 7
    for name, value in plain.items():
        if name not in quantised:
            assert torch.equal(there.pop(name), value)
            continue
        path = name.removesuffix(".weight")
        if config.method == "fp8":
            codes, scales = there.pop(name), there.pop(f"{path}.weight_scale_inv")
        else:
            codes = unpack_int4(there.pop(f"{path}.weight_packed"))
            scales = there.pop(f"{path}.weight_scale")
            assert there.pop(f"{path}.weight_shape").tolist() == list(value.shape)
        read = scheme.read(codes, scales, torch.float32)
        assert torch.equal(read, rounded_weight(value, scheme.group, torch.float32))
    assert not there
    assert manifest.peek(folder)["quantization"] == config.model_dump(exclude_none=True)
    assert (folder / "tokenizer.json").is_file()


def test_config_json_names_the_published_formats(tmp_path: Path) -> None:
    entry = _config(quantize("tiny", tmp_path / "fp8", FP8))
    assert entry == {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    entry = _config(quantize("tiny", tmp_path / "int4", INT4))
    assert (entry["quant_method"], entry["format"]) == ("compressed-tensors", "pack-quantized")
    weights = entry["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["group_size"], weights["symmetric"]) == (4, 64, True)


@pytest.mark.slow
def test_compressed_tensors_takes_the_entry_for_int4(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig as Theirs

    entry = _config(quantize("tiny", tmp_path / "int4", INT4))
    entry.pop("quant_method")
    weights = Theirs.model_validate(entry).config_groups["group_0"].weights
    assert (weights.num_bits, weights.group_size, weights.symmetric) == (4, 64, True)


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found["quantization_config"]  # type: ignore[no-any-return]


@pytest.mark.slow
def test_the_int4_directory_is_what_compressed_tensors_reads(tmp_path: Path) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    there = files(quantize("tiny", tmp_path / "int4", INT4))
    path = "model.layers.0.mlp.down_proj"
    shape = torch.Size(there[f"{path}.weight_shape"].tolist())
    codes = unpack_from_int32(there[f"{path}.weight_packed"], 4, shape)
    scales = there[f"{path}.weight_scale"].float()
    plain = files(MODEL_DIR)[f"{path}.weight"]
    read = (codes.float().view(shape[0], -1, 64) * scales[:, :, None]).flatten(1)
    assert torch.equal(read, rounded_weight(plain, 64, torch.float32))


def test_what_cannot_be_quantised_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"down_proj.weight has 448 .* which groups of 128 do not"):
        quantize("tiny", tmp_path / "out", QuantizationConfig(method="int4"))
    with pytest.raises(ModelError, match="Qwen3MoeForCausalLM is not quantised"):
        quantize("tiny-moe", tmp_path / "out", FP8)
    folder = quantize("tiny", tmp_path / "out", FP8)
    with pytest.raises(ModelError, match="quantised already"):
        check_model(find(ModelConfig(name=str(folder))), FP8)
    broken = shutil.copytree(MODEL_DIR, tmp_path / "broken")
    weights = files(broken)
    weights["model.layers.1.self_attn.k_proj.weight"][0, 0] = torch.inf
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1.self_attn.k_proj.weight has numbers that are not fin"):
        quantize(str(broken), tmp_path / "never", FP8)
    assert not (tmp_path / "never").exists()


def test_the_command_writes_a_directory_or_says_why_not(tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(app, ["quantize", "tiny", str(tmp_path / "a"), "--to", "int4", "--group-size", "32"])
    assert done.exit_code == 0, done.output
    assert _config(tmp_path / "a")["config_groups"]["group_0"]["weights"]["group_size"] == 32
    asked = ["quantize", "tiny", str(tmp_path / "b"), "--to", "fp8", "--group-size", "32"]
    wrong = run(app, asked)
    assert wrong.exit_code == 2
    assert "group_size is 32" in wrong.output


@pytest.mark.parametrize("config", [FP8, INT4])
def test_a_report_says_what_rounding_does_to_each_weight(config: QuantizationConfig) -> None:
    report = quantization_report("tiny", config.method, group_size=config.group_size)
    assert len(report.weights) == 4 * 7
    assert (report.layers, report.parts) == (tuple(range(4)), PARTS)
    squares = sums = 0.0
    for name, value in files(MODEL_DIR).items():
        if not is_quantized(name):
            continue
        change = rounded_weight(value.float(), scheme_of(config).group, torch.float32) - value
        found = next(weight for weight in report.weights if weight.name == name)
        assert found.error == pytest.approx(float(change.norm() / value.norm()), rel=1e-3)
        size = float(value.square().mean().sqrt())
        assert found.largest == pytest.approx(float(change.abs().max()) / size, rel=1e-3)
        shares = (
            (change.abs() <= limit * size).float().mean() for limit in (found.half, found.most)
        )
        assert list(map(float, shares)) == pytest.approx([0.5, 0.99], abs=0.01)
        squares += found.numbers * found.error**2
        sums += found.numbers
    assert report.error == pytest.approx((squares / sums) ** 0.5)
    assert report.worst[0].error == max(weight.error for weight in report.weights)


def test_smaller_groups_round_less_and_a_channel_that_stands_out_shows(tmp_path: Path) -> None:
    wide, narrow = (quantization_report("tiny", "int4", group_size=size) for size in (64, 16))
    assert narrow.error < 0.9 * wide.error
    folder = shutil.copytree(MODEL_DIR, tmp_path / "uneven")
    weights = files(folder)
    name = "model.layers.2.mlp.up_proj.weight"
    weights[name][:, ::64] *= 30  # one large number in each group of 64
    save_file(weights, folder / "model.safetensors")
    uneven = quantization_report(str(folder), "int4", group_size=64)
    assert uneven.worst[0].name == name
    assert uneven.worst[0].lost > 0.5
    shown = uneven._repr_mimebundle_()
    assert "up_proj" in shown["text/plain"].splitlines()[7]
    assert f"{name}: {100 * uneven.worst[0].error:.2f}%" in shown["text/html"]


def test_a_report_of_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(ModelError, match="is not quantised here"):
        quantization_report("tiny-moe", "fp8")
    with pytest.raises(ConfigError, match="group_size"):
        quantization_report("tiny", "fp8", group_size=64)
