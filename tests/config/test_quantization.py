"""Settings of quantised weights: how they are written, what they bring along, what they exclude."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from kit import SessionConfig
from kit.checkpoint.quantize import quantize
from kit.config import ModelConfig, QuantizationConfig, from_yaml
from kit.errors import ConfigError, ModelError
from kit.models.low_precision import check_gpu, check_session
from kit.models.source import find
from kit.operators.fp8_cuda import HOPPER
from tests.small_models import make_model

INT4 = {"method": "int4", "group_size": 64}
WHOLE_BLOCKS = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 128}
"""Sizes of a model whose linear layers are multiples of 128."""


def test_a_method_alone_is_a_whole_section() -> None:
    config = SessionConfig(model={"quantization": "fp8"})
    assert config == SessionConfig().replace("model.quantization", {"method": "fp8"})
    assert config == SessionConfig(**from_yaml(config.to_yaml()))
    assert config.quantization is not None
    assert SessionConfig(model={"quantization": "int4"}).quantization.numbers_a_scale == 128  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match=r"group_size is 64, and fp8 has blocks"):
        SessionConfig(model={"quantization": {"method": "fp8", "group_size": 64}})


def test_an_engine_that_is_quantised_alone_is_corrected_for() -> None:
    assert SessionConfig().training.use_tis is None
    alone = SessionConfig(engine={"quantization": "fp8"})
    assert alone.training.use_tis is True
    assert SessionConfig().replace("engine.quantization", "fp8") == alone
    assert SessionConfig(model={"quantization": "fp8"}).training.use_tis is None
    off = SessionConfig(engine={"quantization": "fp8"}, training={"use_tis": False})
    assert off.training.use_tis is False
    for other in ({"mis": {}}, {"use_rollout_logprobs": True}):
        config = SessionConfig(engine={"quantization": "fp8"}, training=other)
        assert config.training.use_tis is None


def test_a_session_says_what_is_quantised_and_what_corrects_for_it() -> None:
    assert SessionConfig().quantized == ""
    both = SessionConfig(model={"quantization": INT4})
    assert both.quantized == "INT4 in groups of 64 in trainer and engine"
    alone = SessionConfig(engine={"quantization": "fp8"})
    assert alone.quantized == "FP8 in the engine alone; training.use_tis corrects for it"
    off = alone.replace("training.use_tis", False)
    assert off.quantized == "FP8 in the engine alone; nothing corrects for it"


def test_a_cache_of_another_dtype_is_corrected_for_and_told_with_the_rest() -> None:
    cache = SessionConfig(engine={"kv_cache_dtype": "fp8_e4m3"})
    assert cache.training.use_tis is True
    told = "keys and values in fp8_e4m3 in the engine alone; training.use_tis corrects for it"
    assert cache.quantized == told
    both = cache.replace("engine.quantization", "fp8")
    assert both.quantized == f"FP8 and {told}"
    assert cache.replace("model.quantization", "fp8").quantized == (
        f"FP8 in trainer and engine; {told}"
    )
    off = cache.replace("training.use_tis", False)
    with pytest.warns(UserWarning, match=r"kv_cache_dtype rounds .*nothing weighs"):
        check_session(off, find(ModelConfig()), "cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"training": {"true_on_policy": True}}, "promises equal bits"),
        ({"engine": {"speculative": {"algorithm": "ngram"}}}, "never tried"),
    ],
)
def test_what_a_cache_of_another_dtype_does_not_go_with_is_refused(
    settings: dict[str, Any], words: str
) -> None:
    engine = {"kv_cache_dtype": "fp8_e4m3"} | settings.get("engine", {})
    with pytest.raises(ConfigError, match=f"(?s)kv_cache_dtype is fp8_e4m3, .*{words}"):
        SessionConfig(**settings | {"engine": engine})


def test_a_cache_that_the_kit_does_not_know_of_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"set engine\.kv_cache_dtype instead"):
        SessionConfig(engine={"extra": {"kv_cache_dtype": "fp8_e4m3"}})


def test_what_nothing_corrects_for_is_told() -> None:
    model = find(ModelConfig())
    off = SessionConfig(engine={"quantization": "fp8"}, training={"use_tis": False})
    with pytest.warns(UserWarning, match=r"nothing weighs by the difference"):
        check_session(off, model, "cpu")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model": {"quantization": "fp8"}, "engine": {"quantization": "fp8"}}, "already"),
        ({"model": {"quantization": "fp8", "lora": {"r": 4}}}, "model.lora"),
        ({"model": {"lora": {"r": 4}}, "engine": {"quantization": "fp8"}}, "model.lora"),
        ({"model": {"quantization": "fp8"}, "engine": {"weight_bits": 8}}, "weight_bits"),
        ({"model": {"quantization": INT4}, "engine": {"weight_noise": 0.1}}, "weight_noise"),
        ({"model": {"quantization": INT4}, "engine": {"tensor_parallel": 2}}, "tensor_parallel"),
        ({"model": {"quantization": INT4}, "cluster": {"colocate": False}}, "colocate"),
        (
            {"engine": {"quantization": "fp8", "speculative": {"algorithm": "ngram"}}},
            "engine.speculative",
        ),
        ({"model": {"quantization": "fp8"}, "engine": {"extra": {"dtype": "half"}}}, "has dtype"),
        ({"engine": {"quantization": "fp8"}, "training": {"true_on_policy": True}}, "equal bits"),
    ],
)
def test_what_was_never_tried_together_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SessionConfig(**settings)


def test_gpus_other_models_and_sizes_that_do_not_fit_are_refused() -> None:
    tiny, moe = find(ModelConfig()), find(ModelConfig(name="tiny-moe"))
    fp8 = SessionConfig(model={"quantization": "fp8"})
    with pytest.raises(ModelError, match=r"_proj\.weight is \d+ x \d+, and on a GPU blocks"):
        check_session(fp8, tiny, "cuda")
    with pytest.raises(ModelError, match="Qwen3MoeForCausalLM is not quantised"):
        check_session(fp8, moe, "cpu")
    with pytest.raises(ModelError, match=r"mlp\.down_proj\.weight has 448 numbers a row"):
        check_session(SessionConfig(engine={"quantization": "int4"}), tiny, "cpu")
    check_session(SessionConfig(), moe, "cuda")


def test_files_that_are_quantised_are_refused_before_anything_starts(tmp_path: Path) -> None:
    out = quantize("tiny", tmp_path / "out", QuantizationConfig(method="fp8"))
    model = find(ModelConfig(name=str(out)))
    for how in (SessionConfig(), SessionConfig(model={"quantization": "fp8"})):
        with pytest.raises(ModelError, match=r"(?s)quantised already.*made from"):
            check_session(how, model, "cpu")


def test_fp8_on_a_gpu_without_equal_bits_is_warned_of(tmp_path: Path) -> None:
    whole = find(ModelConfig(name=str(make_model(tmp_path / "whole", "Qwen3", **WHOLE_BLOCKS))))
    fp8 = SessionConfig().replace("model.quantization", "fp8")
    with pytest.warns(UserWarning, match="a whole step of FP8"):
        check_session(fp8, whole, "cuda")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_session(fp8.replace("training.true_on_policy", True), whole, "cuda")
        check_session(fp8, whole, "cpu")


def test_what_was_not_run_on_a_gpu_is_refused_there(tmp_path: Path) -> None:
    whole = find(ModelConfig(name=str(make_model(tmp_path / "whole", "Qwen3", **WHOLE_BLOCKS))))
    int4 = SessionConfig(model={"quantization": "int4"})
    check_gpu(int4.replace("training.true_on_policy", True), whole, HOPPER)
    check_gpu(SessionConfig(engine={"quantization": "int4"}), whole, HOPPER)
    check_gpu(int4, whole, HOPPER)
    for side in ("model", "engine"):
        fp8 = SessionConfig().replace(f"{side}.quantization", "fp8")
        check_gpu(fp8, whole, HOPPER)
        for setting, value, what in (
            ("training.num_trainers", 2, "num_trainers is 2"),
            ("model.dtype", "float32", "dtype is float32"),
        ):
            for how in (fp8, fp8.replace(f"{side}.quantization", "int4")):
                with pytest.raises(ConfigError, match=what):
                    check_gpu(how.replace(setting, value), whole, HOPPER)
        for capability in ((8, 9), (12, 0)):
            with pytest.raises(ConfigError, match=r"the GPU has compute capability (8\.9|12\.0)"):
                check_gpu(fp8, whole, capability)
