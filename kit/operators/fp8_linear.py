"""Products of FP8 with a gradient, as a trainer on a GPU computes them.

Forward, codes are multiplied by codes (`kit.operators.fp8_cuda`); backward, bfloat16 by what codes
stand for, which is read from those that the forward pass multiplied: no input is kept but as codes.
`torch.compile` calls these operators and does not look into them, but sees which have the same
inputs: what layers share is quantised and read once.
"""

from __future__ import annotations

from typing import Any

import torch

from kit.operators.fp8_cuda import (
    BLOCK,
    FEW,
    FP8,
    PROVEN,
    TILE_ROWS,
    library_product,
    product,
    quantize_with_room,
    read,
)


def linear(
    x: torch.Tensor, weight: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Product (..., N) of x (..., K) with weight (N, K), both quantised, with a gradient.

    It passes as if nothing had been quantised: of x it is taken with what the weight's codes stand
    for, of the weight with what those of x do, which alone are kept.

    Args:
        x: the rows.
        weight: what gets the gradient.
        own: its codes and scales, by `quantize_blocks`.
    """
    rows = x.reshape(-1, x.shape[-1])
    # An operator of its own: where layers have the same input, compiled code calls it once.
    codes, scales = _rows_op(rows.detach())
    whole: torch.Tensor = _product_op(rows, weight, codes, scales, *own)
    return whole.view(*x.shape[:-1], weight.shape[0])


def _define(name: str, schema: str, function: Any, fake: Any) -> Any:
    """An operator for a compiler: those that `custom_op` makes take longer to call."""
    full = f"kit::{name}"
    torch.library.define(full, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(full, ("cuda", "cpu"), function)  # on a CPU by Triton's interpreter
    torch.library.register_fake(full, fake)
    return getattr(torch.ops.kit, name).default


def _fake_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    room = (x.shape[0] + TILE_ROWS - 1) // TILE_ROWS * TILE_ROWS
    scales = x.new_empty(x.shape[1] // BLOCK, room, dtype=torch.float32)
    return x.new_empty(room, x.shape[1], dtype=FP8), scales


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight_codes: torch.Tensor,
    weight_scales: torch.Tensor,
) -> torch.Tensor:
    """Product (T, N) of codes, those of x (T, K) with room; x and weight get the gradient."""
    rows, own = x.shape[0], (weight_codes, weight_scales)
    if FEW < rows <= PROVEN.get((weight_codes.shape[0], weight_codes.shape[1]), 0):
        return library_product((codes, scales.T), own, x.dtype)[:rows]
    return product((codes[:rows], scales[:, :rows].T), own, x.dtype)


def _fake_product(x: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    _, weight, *quantized = inputs
    ctx.save_for_backward(*quantized)
    ctx.dtype = weight.dtype


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    codes, scales, weight_codes, weight_scales = ctx.saved_tensors
    rows, dtype = gradient.shape[0], gradient.dtype
    of_x = gradient @ _read_blocks_op(weight_codes, weight_scales, dtype)
    of_weight = gradient.T @ _read_rows_op(codes, scales, rows, dtype)
    return of_x, of_weight.to(ctx.dtype), None, None, None, None


def _read_rows(
    codes: torch.Tensor, scales: torch.Tensor, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    """What the first rows of x's codes, with room, stand for, (T, K)."""
    return read(codes[:rows], scales.T, 1, dtype)


def _fake_read_rows(
    codes: torch.Tensor, _scales: torch.Tensor, rows: int, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(rows, codes.shape[1], dtype=dtype)


def _read_blocks(codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a weight's codes (N, K) stand for."""
    return read(codes, scales, BLOCK, dtype)


def _fake_read_blocks(
    codes: torch.Tensor, _scales: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(codes.shape, dtype=dtype)


_rows_op = _define("fp8_rows", "(Tensor x) -> (Tensor, Tensor)", quantize_with_room, _fake_rows)
_product_op = _define(
    "fp8_product",
    "(Tensor x, Tensor weight, Tensor codes, Tensor scales, Tensor weight_codes, "
    "Tensor weight_scales) -> Tensor",
    _product,
    _fake_product,
)
_read_rows_op = _define(
    "fp8_read_rows",
    "(Tensor codes, Tensor scales, SymInt rows, ScalarType dtype) -> Tensor",
    _read_rows,
    _fake_read_rows,
)
_read_blocks_op = _define(
    "fp8_read_blocks",
    "(Tensor codes, Tensor scales, ScalarType dtype) -> Tensor",
    _read_blocks,
    _fake_read_blocks,
)
torch.library.register_autograd("kit::fp8_product", _gradients, setup_context=_keep)
