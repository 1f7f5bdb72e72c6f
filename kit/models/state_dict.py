"""A Transformers model's weights under the names of its checkpoint, which SGLang loads.

Transformers may hold a weight in another form than the checkpoint that it comes from, such as all
experts of a layer in one tensor, and knows the way back: the conversions of `from_pretrained`,
reverted. SGLang silently ignores names that it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def named_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and persistent buffers by name; a tensor that has two names comes once."""
    yield from model.named_parameters()
    yield from saved_buffers(model)


def saved_buffers(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Buffers that are part of a checkpoint, such as a router's correction bias."""
    for prefix, module in model.named_modules():
        for name, value in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set and value.is_floating_point():
                yield f"{prefix}.{name}" if prefix else name, value


def as_saved(model: Any, name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a weight under its checkpoint names.

    Args:
        model: the Transformers model it belongs to.
        name: its name in the model.
        value: the whole weight; on the meta device, names and shapes are what it is good for.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if getattr(model, "_weight_conversions", None) == []:  # loaded, and nothing was converted
        yield name, value
    else:
        yield from revert_weight_conversion(model, {name: value}).items()
