"""Taking rows out of a tensor and putting them into one.

Indexing has to allow for rows named twice, so its gradient adds row by row, one after the other.
Where each row is named once, taking and putting are each other's gradient, and both are copies.
"""

from __future__ import annotations

from typing import Any

import torch


def put_rows(x: torch.Tensor, rows_T: torch.Tensor, size: int) -> torch.Tensor:
    """A tensor of `size` rows that has `x` at `rows_T` and 0 elsewhere."""
    return x.new_zeros(size, *x.shape[1:]).index_copy(0, rows_T, x)


def take_rows(x: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
    """`x[rows_T]`; each row at most once."""
    taken: torch.Tensor = _TakeRows.apply(x, rows_T)  # type: ignore[no-untyped-call]
    return taken


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows_T: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows_T)
        ctx.size = len(x)
        return x.index_select(0, rows_T)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows_T,) = ctx.saved_tensors
        return put_rows(gradient, rows_T, ctx.size), None


def repeat_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`x[rows]`; a row may be named often. Its gradient is summed in float32, in a fixed order."""
    repeated: torch.Tensor = _RepeatRows.apply(x, rows)  # type: ignore[no-untyped-call]
    return repeated


class _RepeatRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows)
        ctx.size = len(x)
        return x.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (rows,) = ctx.saved_tensors
        wide = gradient.float() if gradient.element_size() < 4 else gradient
        total = wide.new_zeros(ctx.size, *gradient.shape[1:])
        if gradient.is_cuda:  # index_add_ adds there in the order in which threads come
            total.index_put_((rows,), wide, accumulate=True)
        else:
            total.index_add_(0, rows, wide)
        return total.to(gradient.dtype), None
