"""The operators of `sgl_kernel` that SGLang calls on a CPU, in plain torch.

SGLang imports many more names from here at start-up than a dense text model ever calls; each of
those imports fine and raises where it is called, naming itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .speculative import (
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)

__all__ = [
    "assign_draft_cache_locs_contiguous_cpu",
    "assign_extend_cache_locs_cpu",
    "assign_req_to_token_pool_cpu",
    "build_tree_kernel_efficient_cpu",
    "copy_all_layer_kv_cache_cpu",
    "fill_accept_out_cache_loc_cpu",
    "fill_bonus_tokens_cpu",
    "verify_tree_greedy_cpu",
]
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
    rows, columns = _places(req_pool_indices, start_offset, end_offset)
    req_to_token[rows, columns] = out_cache_loc[: rows.numel()].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
) -> None:
    """Read what `assign_req_to_token_pool_cpu` writes; `out_cache_loc` is written."""
    rows, columns = _places(req_pool_indices, start_offset, end_offset)
    out_cache_loc[: rows.numel()] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    seq_lens: torch.Tensor,
    out_cache_loc: torch.Tensor,
    pool_len: int,
    topk: int,
    num_steps: int,
) -> None:
    """Read the slots of `topk * num_steps` tokens that a draft writes after each request's."""
    end = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(
        req_pool_indices, req_to_token, seq_lens, end, out_cache_loc, pool_len
    )


def _places(
    req_pool_indices: torch.Tensor, start_offset: torch.Tensor, end_offset: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) in the table of each place from start to end, all requests in a row."""
    counts = (end_offset - start_offset).long()
    rows = torch.repeat_interleave(req_pool_indices.long(), counts)
    first = torch.repeat_interleave(start_offset.long() - (counts.cumsum(0) - counts), counts)
    return rows, first + torch.arange(rows.numel(), device=rows.device)


def copy_all_layer_kv_cache_cpu(
    data_ptrs: torch.Tensor, strides: torch.Tensor, tgt_loc: torch.Tensor, src_loc: torch.Tensor
) -> None:
    """Do nothing where a slot is copied onto itself, as SGLang does to warm up.

    Raises:
        RuntimeError: it would have to copy. `kit.engine.cpu.speculative` has SGLang do that in
            torch.
    """
    if not torch.equal(tgt_loc, src_loc):
        raise RuntimeError("SGLANG_NATIVE_MOVE_KV_CACHE has to be set where a draft is a tree")


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
