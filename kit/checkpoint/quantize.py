"""A model's directory with its linear layers in FP8 or INT4, and what that does to its weights."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from kit.checkpoint import manifest
from kit.checkpoint.export import copy_beside
from kit.config import ModelConfig, QuantizationConfig, SessionConfig
from kit.errors import ModelError
from kit.reports.quantization import QuantizationReport, QuantizedWeight

if TYPE_CHECKING:
    import torch

    from kit.operators.low_precision import Scheme


def quantize(model: str, out: Path, config: QuantizationConfig) -> Path:
    """Write a quantised copy of a model, and return its path.

    The weights are those that a session with these settings trains with and sends. All others are
    copied as they are.

    Args:
        model: a directory, a name on the hub, or one that ships with the kit.
        out: the directory to write; an export that is there is replaced.
        config: how.

    Raises:
        ModelError: it is no model that can be quantised so, or has numbers that are not finite.
        CheckpointError: it cannot be written, or something else is in the way.
    """
    from kit.models.low_precision import check_model, scheme_of
    from kit.models.source import find
    from kit.trainer.hf_export import write

    source, scheme = find(ModelConfig(name=model)), scheme_of(config)
    check_model(source, config)
    target, folder_of = out.absolute(), Path(source.path)
    with manifest.new_folder(target, "export") as folder:
        write(_quantized(folder_of, scheme), str(folder))
        copy_beside(folder_of, folder, quantized=config)
        facts = {"made_from": model, "quantization": config.model_dump(exclude_none=True)}
        manifest.seal(folder, "export", facts)
    return target


def quantization_report(
    model: str, to: Literal["fp8", "int4"], *, group_size: int | None = None
) -> QuantizationReport:
    """Compare a model's weights with what their codes and scales would stand for.

        kit.quantization_report("Qwen/Qwen3-0.6B", "int4", group_size=64)

    Nothing is written, and nothing of a stack is started. Where rounding takes much from some
    weights, smaller groups help, and training through them (`model.quantization`) does.

    Args:
        model: a directory, a name on the hub, or one that ships with the kit.
        to: fp8 (blocks of 128 x 128) or int4 (groups along each row).
        group_size: numbers of a row that share a scale, for int4; None takes 128.

    Raises:
        ModelError: it is no model that can be quantised so, or has numbers that are not finite.
        ConfigError: there is no such quantisation.
    """
    from kit.models.low_precision import check_model, is_quantized, scheme_of
    from kit.models.source import find

    wanted = {"method": to, "group_size": group_size}
    config = SessionConfig(engine={"quantization": wanted}).quantization
    assert config
    source, scheme = find(ModelConfig(name=model)), scheme_of(config)
    check_model(source, config)
    weights = [
        _compared(name, tensor, scheme)
        for name, tensor in _tensors(Path(source.path))
        if is_quantized(name)
    ]
    order = {part: place for place, part in enumerate(PARTS)}
    weights.sort(key=lambda weight: (weight.layer, order[weight.part]))
    return QuantizationReport(model, str(config), tuple(weights))


PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The projections that are quantised, in the order in which a layer has them."""
COMPARED = 1 << 20
"""Of a larger weight the quantiles are those of so many of its numbers, evenly spread."""


def _compared(name: str, tensor: torch.Tensor, scheme: Scheme) -> QuantizedWeight:
    """What quantising does to one weight."""
    import torch

    weight = tensor.float()
    if not weight.isfinite().all():
        raise ModelError(
            f"{name} has numbers that are not finite.", fix="take a model without them."
        )
    change = (scheme.read(*scheme.quantize(weight), torch.float32) - weight).abs()
    size = float(weight.square().mean().sqrt()) or 1.0
    some = change.flatten()[:: -(-change.numel() // COMPARED)]
    half, most = (float(x) / size for x in some.quantile(torch.tensor([0.5, 0.99])))
    path = name.split(".")
    return QuantizedWeight(
        name=name,
        layer=int(path[2]),
        part=path[-2],
        numbers=weight.numel(),
        error=float(change.square().mean().sqrt()) / size,
        half=half,
        most=most,
        largest=float(change.max()) / size,
        lost=float(((change == weight.abs()) & (weight != 0)).float().mean()),
    )


def _quantized(model: Path, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a model's files as quantised files hold them."""
    from kit.models.low_precision import as_stored

    for name, tensor in _tensors(model):
        yield from as_stored(name, tensor, scheme)


def _tensors(model: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a model's files, one after the other."""
    from safetensors import safe_open

    from kit.models.source import weight_files

    for path in weight_files(model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield name, file.get_tensor(name)
