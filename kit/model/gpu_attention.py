"""Torch's variable-length flash attention as one operator that `torch.compile` takes as it is.

Torch's own takes the longest lengths as numbers, which compiled code would have to allow for; here
they are a tensor on the host. Grouped queries need no copies of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.attention import varlen as _varlen  # registers the operators used here

assert _varlen
CAUSAL = [-1, 0]
"""Counted from the end: a sequence's last token sees all of it."""


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Causal attention within each sequence, (T, heads, D).

    Args:
        q: (T, heads, D).
        k: (tokens seen, key heads, D); as many heads as q, or a divisor of them.
        v: the same.
        own_ends: cumulative lengths of the sequences in q, with a leading 0, int32.
        seen_ends: the same of k and v.
        limits: longest of either, on the host.
        scale: multiplies the products of queries and keys.
    """
    out: torch.Tensor = _forward(q, k, v, own_ends, seen_ends, limits, scale)[0]
    return out


@torch.library.custom_op("kit::packed_attention", mutates_args=(), device_types="cuda")
def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    own, seen = limits.tolist()
    out, total, _ = torch.ops.torch_attn._varlen_attn(
        q, k, v, own_ends, seen_ends, own, seen, True, scale, CAUSAL
    )
    return out, total


@_forward.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("kit::packed_attention_backward", mutates_args=(), device_types="cuda")
def _backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    own, seen = limits.tolist()
    draws = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        gradient.contiguous(),
        q,
        k,
        v,
        out,
        total,
        own_ends,
        seen_ends,
        own,
        seen,
        True,
        draws,
        scale,
        CAUSAL,
    )
    return dq, dk, dv


@_backward.register_fake
def _(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, own_ends, seen_ends, limits, out, total = ctx.saved_tensors
    found = _backward(gradient, q, k, v, out, total, own_ends, seen_ends, limits, ctx.scale)
    return (*found, None, None, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)
