"""Taking rows out of a tensor and putting them into one, where no row is named twice.

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
