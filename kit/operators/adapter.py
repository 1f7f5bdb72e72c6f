"""An adapter's share of a linear layer: base + factor (x A^T) B^T, with its gradient.

One operator and not four, because compiling the many small ones of a layer takes minutes, and
launching them longer than computing them. The sum is made in the accumulator of the last product
and rounded once.
"""

from __future__ import annotations

from typing import Any

import torch

_OPERATORS = torch.library.Library("kit", "FRAGMENT")
_OPERATORS.define(
    "add_adapter(Tensor base, Tensor x, Tensor a, Tensor b, float factor) -> (Tensor, Tensor)"
)
_OPERATORS.define(
    "adapter_gradients(Tensor gradient, Tensor x, Tensor narrow, Tensor a, Tensor b, float factor)"
    " -> (Tensor, Tensor, Tensor)"
)


def add_adapter(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float
) -> torch.Tensor:
    """Base + factor (x A^T) B^T, in base's dtype.

    Args:
        base: (..., out), what the layer's weight makes of x.
        x: (..., in).
        a: (r, in).
        b: (out, r).
        factor: of the product.
    """
    sum_: torch.Tensor = torch.ops.kit.add_adapter(base, x, a, b, factor)[0]
    return sum_


def _forward(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    narrow = x.reshape(-1, x.shape[-1]) @ a.T
    sum_ = torch.addmm(base.reshape(-1, base.shape[-1]), narrow, b.T, alpha=factor)
    return sum_.view(base.shape), narrow


def _backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    narrow: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, A and B."""
    of_sum, nothing = gradient.reshape(-1, gradient.shape[-1]), b.new_empty(1)
    of_narrow = torch.addmm(nothing, of_sum, b, beta=0, alpha=factor)
    of_b = torch.addmm(nothing, of_sum.T, narrow, beta=0, alpha=factor)
    of_a = of_narrow.T @ x.reshape(-1, x.shape[-1])
    return (of_narrow @ a).view(x.shape), of_a, of_b


_OPERATORS.impl("add_adapter", _forward, "CompositeExplicitAutograd")
_OPERATORS.impl("adapter_gradients", _backward, "CompositeExplicitAutograd")


@torch.library.register_fake("kit::add_adapter")
def _(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return base.new_empty(base.shape), x.new_empty(x.numel() // x.shape[-1], a.shape[0])


@torch.library.register_fake("kit::adapter_gradients")
def _(
    _gradient: torch.Tensor,
    x: torch.Tensor,
    _narrow: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    _factor: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), a.new_empty(a.shape), b.new_empty(b.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    _, x, a, b, ctx.factor = inputs
    ctx.save_for_backward(x, output[1], a, b)


def _gradients(ctx: Any, gradient: torch.Tensor, _of_narrow: Any) -> tuple[Any, ...]:
    found = torch.ops.kit.adapter_gradients(gradient, *ctx.saved_tensors, ctx.factor)
    return gradient, *found, None


torch.library.register_autograd("kit::add_adapter", _gradients, setup_context=_keep)
