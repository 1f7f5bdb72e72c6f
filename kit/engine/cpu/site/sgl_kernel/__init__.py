"""The operators of `sgl_kernel` that SGLang calls on a CPU, in plain torch.

SGLang imports many more names from here at start-up than a dense text model ever calls; each of
those imports fine and raises where it is called, naming itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__version__ = "0.4.5"


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Write each request's new cache slots into its row of the table.

    Args:
        req_pool_indices: row of each request in `req_to_token`, shape (requests,).
        req_to_token: cache slot of each token of each request, (rows, pool_len); written.
        start_offset: first position written, by request.
        end_offset: position after the last one written, by request.
        out_cache_loc: the slots, all requests one after the other.
        pool_len: columns of `req_to_token`.
    """
    counts = end_offset - start_offset
    rows = torch.repeat_interleave(req_pool_indices, counts)
    first = torch.repeat_interleave(start_offset - (counts.cumsum(0) - counts), counts)
    columns = first + torch.arange(rows.numel(), device=rows.device)
    req_to_token[rows.long(), columns.long()] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: Any, **__: Any) -> Any:
        raise RuntimeError(
            f"sgl_kernel.{name} has no CPU version in the kit. The model or a setting in "
            f"engine.extra asks SGLang for an operator that only exists for GPUs."
        )

    missing.__name__ = name
    return missing
