"""Maps parameters to the names that checkpoints, and SGLang, use."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


def named_weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of a Transformers model by name; a tied output embedding is part of it once."""
    tied = model.config.tie_word_embeddings
    for name, value in model.named_parameters():
        if not (tied and name == "lm_head.weight"):
            yield name, value


def as_saved(name: str, value: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a parameter under its checkpoint names, which are those that SGLang loads.

    Transformers holds the experts of a layer in one tensor; checkpoints store them one by one, and
    SGLang silently ignores names that it does not know.
    """
    place, _, part = name.rpartition(".experts.")
    if part == "down_proj" and value.ndim == 3:
        for expert, down in enumerate(value):
            yield f"{place}.experts.{expert}.down_proj.weight", down
    elif part == "gate_up_proj" and value.ndim == 3:
        for expert, both in enumerate(value):
            gate, up = both.chunk(2)
            yield f"{place}.experts.{expert}.gate_proj.weight", gate
            yield f"{place}.experts.{expert}.up_proj.weight", up
    else:
        yield name, value
