"""Products of FP8 with a gradient, as a trainer on a GPU computes them.

Forward, codes are multiplied by codes (`kit.operators.fp8_cuda`); backward, bfloat16 by what codes
stand for, which is read from those that the forward pass multiplied: no input is kept but as codes.

`torch.compile` sees what these operators consist of, kernels and torch's products, and launches
them itself: an operator that it does not look into takes the host several times as long. What
layers share is quantised and read once.
"""

from __future__ import annotations

import hashlib
import pkgutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.library import triton_op

from kit.operators import fp8_cuda
from kit.operators.fp8_cuda import BLOCK, FEW

SOURCES = ("fp8_cuda.py", "fp8_kernels.py", "fp8_linear.py")
"""What compiled code is made of."""


def linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    most: int,
) -> torch.Tensor:
    """Products (..., N) of x (..., K) with weights (N, K), quantised, with a gradient, in one.

    It passes as if nothing had been quantised: of x it is taken with what the weights' codes stand
    for, of the weights with what those of x do, which alone are kept.

    Args:
        x: the rows.
        weights: up to three, which get gradients; their products lie side by side.
        own: their codes and scales, by `quantize_all`.
        most: for how many rows torch's library multiplies them, by `prove_products`.
    """
    rows = x.reshape(-1, x.shape[-1])
    given = (*weights, None, None)[:3]
    if torch.compiler.is_compiling():
        whole: torch.Tensor = _product_op(rows, *given, *_rows_op(rows.detach()), *own, most)
    else:
        quantized = fp8_cuda.quantize_with_room(rows.detach())
        whole = _Product.apply(rows, *given, *quantized, *own)  # type: ignore[no-untyped-call]
    return whole.view(*x.shape[:-1], whole.shape[1])


def _gradients(
    gradient: torch.Tensor,
    kept: tuple[torch.Tensor, ...],
    heights: Sequence[int],
    dtype: torch.dtype,
    read: Callable[..., torch.Tensor],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of x, and of up to three weights of so many rows, in their dtype."""
    codes, scales, weight_codes, weight_scales = kept
    of_x = gradient @ read(weight_codes, weight_scales, BLOCK, gradient.dtype)
    x = read(codes[: gradient.shape[0]], scales.T, 1, gradient.dtype)
    of_weights = (gradient.T @ x).to(dtype).split(heights)
    return (of_x, *(*of_weights, None, None)[:3])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, first, second, third, *kept = inputs[:8]
    ctx.save_for_backward(*kept)
    weights = [weight for weight in (first, second, third) if weight is not None]
    ctx.heights, ctx.dtype = [weight.shape[0] for weight in weights], first.dtype


class _Product(torch.autograd.Function):
    """Product (T, N) of x (T, K), whose codes have room; x and weights get gradients."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        _first: torch.Tensor,
        _second: torch.Tensor | None,
        _third: torch.Tensor | None,
        codes: torch.Tensor,
        scales: torch.Tensor,
        *own: torch.Tensor,
    ) -> torch.Tensor:
        weight_codes, weight_scales = own
        rows = codes[: x.shape[0]], scales[:, : x.shape[0]].T
        return fp8_cuda.product(rows, (weight_codes, weight_scales), x.dtype)

    setup_context = staticmethod(_keep)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        of = _gradients(gradient, ctx.saved_tensors, ctx.heights, ctx.dtype, fp8_cuda.read)
        return (*of, None, None, None, None)


# ---- what `torch.compile` sees -------------------------------------------------------------------


def _version() -> str:
    """Part of the operators' names, and so of the key by which compiled code is kept on disk."""
    sources = (pkgutil.get_data(__package__, name) or b"" for name in SOURCES)
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


VERSION = _version()


def _shown(name: str, schema: str) -> Callable[[Callable[..., Any]], Any]:
    """An operator that a compiler looks into, its kernels under `traced`."""
    return triton_op(f"kit::{name}_{VERSION}", mutates_args=(), schema=schema)


@_shown("fp8_rows", "(Tensor x) -> (Tensor, Tensor)")
def _rows_op(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return fp8_cuda.quantize_with_room(x, traced=True)


@_shown("fp8_read", "(Tensor codes, Tensor scales, int height, ScalarType dtype) -> Tensor")
def _read_op(
    codes: torch.Tensor, scales: torch.Tensor, height: int, dtype: torch.dtype
) -> torch.Tensor:
    return fp8_cuda.read(codes, scales, height, dtype, traced=True)


@_shown(
    "fp8_product",
    "(Tensor x, Tensor first, Tensor? second, Tensor? third, Tensor codes, Tensor scales, "
    "Tensor weight_codes, Tensor weight_scales, int most) -> Tensor",
)
def _product_op(
    x: torch.Tensor,
    _first: torch.Tensor,
    _second: torch.Tensor | None,
    _third: torch.Tensor | None,
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    most: int,
) -> torch.Tensor:
    rows, own = x.shape[0], (weight_codes, weight_scales)
    if FEW < rows <= most:
        return fp8_cuda.library_product((codes, scales.T), own, x.dtype)[:rows]
    few: torch.Tensor = _few_op(codes[:rows], scales[:, :rows], *own, x.dtype)
    return few


def _product_gradients(ctx: Any, gradient: torch.Tensor) -> Any:
    of = _gradients(gradient, ctx.saved_tensors, ctx.heights, ctx.dtype, _read_op)
    return (*of, None, None, None, None, None)


_product_op.register_autograd(_product_gradients, setup_context=_keep)


@torch.library.custom_op(f"kit::fp8_few_{VERSION}", mutates_args=())
def _few_op(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Product of few rows, or of weights that torch's library does not multiply; opaque."""
    return fp8_cuda.product((codes, scales.T), (weight_codes, weight_scales), dtype)


@_few_op.register_fake
def _(
    codes: torch.Tensor,
    _scales: torch.Tensor,
    weight_codes: torch.Tensor,
    _weight_scales: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], weight_codes.shape[0], dtype=dtype)
