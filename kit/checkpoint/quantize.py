"""`kit quantize`: a model's directory with its linear layers in FP8 or INT4."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kit.checkpoint import manifest
from kit.checkpoint.export import copy_beside
from kit.config import ModelConfig, QuantizationConfig

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


def _quantized(model: Path, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """All tensors of a model's files, one after the other."""
    from safetensors import safe_open

    from kit.models.low_precision import as_stored
    from kit.models.source import weight_files

    for path in weight_files(model):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                yield from as_stored(name, file.get_tensor(name), scheme)
