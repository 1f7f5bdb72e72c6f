"""Taking rows out of a tensor and putting them into one.

Indexing has to allow for rows named twice, so its gradient adds row by row, one after the other.
Where each row is named once, taking and putting are each other's gradient, and both are copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

PutBack = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def sums_of(rows: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(places sorted by the row that they hold, where each row's end), for `size` rows in all."""
    counts = torch.bincount(rows, minlength=size)
    return torch.argsort(rows, stable=True), torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def put_rows(x: torch.Tensor, rows_T: torch.Tensor, size: int) -> torch.Tensor:
    """A tensor of `size` rows that has `x` at `rows_T` and 0 elsewhere."""
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, rows_T, x)


def take_rows(x: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    """`x[rows_T]`; each row at most once."""
    taken: torch.Tensor = _Rows.apply(x, rows_T, put_rows)  # type: ignore[no-untyped-call]
    return taken


def repeat_rows(
    x: torch.Tensor,
    rows: torch.Tensor,
    order: torch.Tensor | None = None,
    order_ends: torch.Tensor | None = None,
) -> torch.Tensor:
    """`x[rows]`; a row may be named often. Its gradient is summed in float32, in a fixed order.

    Args:
        x: (size, ...).
        rows: which to take.
        order: with `order_ends` what `sums_of(rows, size)` gives, for a faster gradient on a GPU.
        order_ends: see there.
    """
    repeated: torch.Tensor
    if order is None or order_ends is None:
        repeated = _Rows.apply(x, rows, _add_rows)  # type: ignore[no-untyped-call]
    else:
        repeated = _SummedRows.apply(x, rows, order, order_ends)  # type: ignore[no-untyped-call]
    return repeated


def _add_rows(x: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """A tensor of `size` rows, each the sum of what `x` has for it."""
    wide = x.float() if x.element_size() < 4 else x
    total = wide.new_zeros(size, *x.shape[1:])
    if x.is_cuda:  # index_add_ adds there in the order in which threads come
        total.index_put_((rows,), wide, accumulate=True)
    else:
        total.index_add_(0, rows, wide)
    return total.to(x.dtype)


class _Rows(torch.autograd.Function):
    """`x[rows]`, whose gradient goes back by a function of its own."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor, back: PutBack) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.size, ctx.back = len(x), back
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (rows,) = ctx.saved_tensors
        return ctx.back(gradient, rows, ctx.size), None, None


class _SummedRows(torch.autograd.Function):
    """`x[rows]`, whose gradient is summed row by row in one pass."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, rows: torch.Tensor, order: torch.Tensor, ends: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, ends)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, ends = ctx.saved_tensors
        return _sum_stretches(gradient, order, ends), None, None, None


@torch.library.custom_op("kit::sum_stretches", mutates_args=())
def _sum_stretches(x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Row i is the sum of x[order[ends[i]:ends[i + 1]]], in float32 inside."""
    sorted_rows = x.flatten(1).index_select(0, order).float()
    total = torch.segment_reduce(sorted_rows, "sum", offsets=ends, axis=0, unsafe=True)
    return total.to(x.dtype).view(-1, *x.shape[1:])


@_sum_stretches.register_fake
def _(x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    return x.new_empty((ends.shape[0] - 1, *x.shape[1:]))
