"""What is done to a model's layers before training: recomputation, and `torch.compile` on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Recompute = Literal["none", "selective", "alternating", "full"]


VARIANTS = 64
"""So many compiled versions of a layer are kept: with and without gradient, with shared rows and
without, for few rows and many, and for each way to recompute."""


def recompute(model: nn.Module, layers: Iterable[nn.Module], level: Recompute) -> None:
    """What the backward pass makes again instead of the forward pass keeping it.

    Args:
        model: a Transformers model.
        layers: its layers.
        level: `selective` the feed-forward part of each layer, which saves most for its price;
            `full` each layer whole, of which only the input is kept; `alternating` the one for
            every other layer, and the other for those between.
    """
    if level in ("alternating", "full"):
        whole: Any = model
        whole.gradient_checkpointing_enable({"use_reentrant": False})
    if level in ("selective", "alternating"):
        step = 1 if level == "selective" else 2
        some: list[Any] = list(layers)[::step]
        for layer in some:
            layer.gradient_checkpointing = False
            layer.mlp.__class__ = _recomputed(layer.mlp.__class__)


@cache
def _recomputed(kind: Any) -> Any:
    """A class, and no function for each layer: compiled code is then the same for all of them."""

    def forward(self: Any, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args)
        return checkpoint(lambda *inner: kind.forward(self, *inner), *args, use_reentrant=False)

    return type(kind.__name__, (kind,), {"forward": forward})


def compile_layers(layers: Iterable[nn.Module]) -> None:
    """Compile each layer's forward pass in place: its many small operations become few kernels.

    All layers share one result, made at the first call and kept on disk for later runs. Lengths are
    left open in it, so that no batch needs another one.
    """
    import torch._dynamo

    torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True, fullgraph=True)
