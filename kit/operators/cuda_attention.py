"""Attention on a GPU that gives a query the same bits alone as among others.

FlashAttention-3 with one split where `sgl_kernel` has it and its tiles do not depend on the number
of queries, else `attention_kernel`. Without a gradient: `kit.models.shared_operators` has that.

Shapes: T rows, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from kit.errors import ModelError
from kit.operators.unknown import unknown

HEAD_SIZES = {"fa3": (128,), "triton": (16, 32, 64, 128)}
"""Head sizes for which each kind of attention gives a query the same bits alone as among others."""


@cache
def fa3() -> Any:
    """`sgl_kernel`'s FlashAttention-3 for sequences of different lengths; None without it."""
    if torch.cuda.get_device_capability()[0] != 9:
        return None
    try:
        from sgl_kernel.flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def attention_of(config: Any, wanted: str = "auto") -> str:
    """The kind of attention for a model on this GPU: `fa3` or `triton`.

    Args:
        config: the model's Transformers configuration.
        wanted: a kind, or `auto`.

    Raises:
        ModelError: neither kind, or not the one wanted, is made for heads of the model's size.
    """
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = [kind for kind, sizes in HEAD_SIZES.items() if size in sizes]
    if "fa3" in kinds and fa3() is None:
        kinds.remove("fa3")
    if wanted == "auto" and kinds:
        return kinds[0]
    if wanted in kinds:
        return wanted
    if kinds:
        raise ModelError(
            f"training.true_on_policy cannot be had with {wanted} attention on this GPU, for heads "
            f"of {size}.",
            fix=f"leave engine.attention_backend out, which takes {kinds[0]}.",
        )
    raise unknown(f"its heads are of {size}, and the kit has {HEAD_SIZES['triton']}")


def attend(
    kind: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    longest: tuple[int, int],
    scale: float,
    seen_rows: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence: (T, H, D), and log-sum-exp of the scores (H, T).

    Args:
        kind: `fa3` or `triton`.
        q: (T, H, D).
        k: (rows, G, D).
        v: as k.
        own_ends: cumulative lengths of the sequences in q, with a leading 0, int32.
        seen_ends: cumulative lengths of what each sees.
        longest: longest sequence in q, and longest that is seen.
        scale: multiplies the products of queries and keys.
        seen_rows: row of k and v of each token seen; without it they are the rows. `triton` only.
    """
    if kind == "fa3":
        # With one query a sequence it would leave out the mask, and take other tiles.
        out, total, *_ = fa3()(
            q,
            k,
            v,
            cu_seqlens_q=own_ends,
            cu_seqlens_k=seen_ends,
            max_seqlen_q=max(2, longest[0]),
            max_seqlen_k=longest[1],
            softmax_scale=scale,
            causal=True,
            num_splits=1,
            return_softmax_lse=True,
        )
        return out, total
    from kit.operators.kernels import attention_kernel

    rows, heads, size = q.shape
    shared = heads // k.shape[1]
    q = q if q.stride()[1:] == (size, 1) else q.contiguous()
    k, v = (x if x.stride()[1:] == (size, 1) else x.contiguous() for x in (k, v))
    out = q.new_empty(q.shape)
    total = q.new_empty((heads, rows), dtype=torch.float32)
    grid = (len(own_ends) - 1, k.shape[1], -(-longest[0] * shared // 64))
    attention_kernel[grid](
        q,
        k,
        v,
        out,
        total,
        own_ends,
        seen_ends,
        own_ends if seen_rows is None else seen_rows,
        scale * 1.4426950408889634,
        rows,
        q.stride(0),
        k.stride(0),
        v.stride(0),
        GATHERS=seen_rows is not None,
        SHARED=shared,
        SIZE=size,
        ROWS=64,
        KEYS=64,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out, total
