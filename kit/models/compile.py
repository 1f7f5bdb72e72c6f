"""Recomputation of activations, and `torch.compile` of a model's layers on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "alternating", "full"]
VARIANTS = 64
"""How many compiled versions of a layer are kept: with and without gradient, with shared rows and
without, for few rows and many, and for each way to recompute."""


def recompute(
    model: nn.Module, layers: Iterable[nn.Module], level: Recompute, feed_forward: str = "mlp"
) -> None:
    """Set what the backward pass recomputes instead of the forward pass keeping it.

    Args:
        model: a Transformers model.
        layers: its layers.
        level: `selective`: the feed-forward part of each layer, which saves most for its cost.
            `full`: each whole layer, of which only the input is kept. `alternating`: one for every
            other layer, the other for those between.
        feed_forward: attribute of a layer that holds its feed-forward part.
    """
    if level in ("alternating", "full"):
        whole: Any = model
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    if level in ("selective", "alternating"):
        step = 1 if level == "selective" else 2
        some: list[Any] = list(layers)[::step]
        for layer in some:
            layer.gradient_checkpointing = False
            part = getattr(layer, feed_forward)
            part.__class__ = _recomputed(part.__class__)


@cache
def _recomputed(kind: Any) -> Any:
    """Subclass that recomputes. One class for all layers lets them share compiled code."""

    def forward(self: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args)
        return checkpoint(lambda *inner: kind.forward(self, *inner), *args, use_reentrant=False)

    return type(kind.__name__, (kind,), {"forward": forward})


def compile_layers(layers: Iterable[nn.Module], *, rounds: bool = False) -> None:
    """Compile each layer's forward pass in place: its many small operations become few kernels.

    All layers share one compiled result, made at the first call and kept on disk for later runs.
    Lengths are dynamic, so that one result serves every batch.

    Args:
        layers: of a model.
        rounds: every operation's result is rounded to its dtype, as it is without compiling;
            otherwise several in one kernel have float32 between them.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(
            layer.forward,
            dynamic=True,
            fullgraph=True,
            options={"emulate_precision_casts": rounds},
        )


def hold_shapes(*tensors: torch.Tensor) -> None:
    """Have compiled layers take the shapes of these as they are, as they do with parameters'."""
    import torch._dynamo

    for tensor in tensors:
        torch._dynamo.mark_static(tensor)
