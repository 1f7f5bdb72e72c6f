"""Attention with a soft cap on its scores, or with sinks: what one fused kernel does not compute.

A soft cap c makes c tanh(s / c) of a score s (Gemma 2). A sink is a number of each head that takes
part in the softmax and has no value, so that a token may attend to nothing (gpt-oss).

`attend` takes sequences that lie one after the other, on a CPU or a GPU. It computes slice after
slice of the queries, in float32, and keeps none of the scores: its backward pass makes them anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

SCORES_AT_ONCE = 1 << 24
"""Scores of all heads in one slice: 64 MiB."""


def shares(
    scores: torch.Tensor,
    visible: torch.Tensor,
    cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """How much each query takes of each key: scores after cap, mask and softmax.

    Args:
        scores: (..., queries, keys).
        visible: which keys a query sees, of a shape that broadcasts to `scores`.
        cap: c of the soft cap; 0 for none.
        sinks: of a shape that broadcasts to (..., queries, 1); None without.
    """
    if cap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return torch.softmax(scores, dim=-1)
    sink = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]


@dataclass(frozen=True, slots=True)
class _Slice:
    """Some queries of one sequence, and the keys that at least one of them sees."""

    queries: slice
    keys: slice
    visible: torch.Tensor


def _slices(
    own_ends: torch.Tensor, seen_ends: torch.Tensor, heads: int, window: int
) -> Iterator[_Slice]:
    own, seen, device = own_ends.tolist(), seen_ends.tolist(), own_ends.device
    for number in range(len(own) - 1):
        count, keys = own[number + 1] - own[number], seen[number + 1] - seen[number]
        size = max(1, SCORES_AT_ONCE // (heads * keys))
        for begin in range(0, count, size):
            end = min(begin + size, count)
            # Counted from the end: a sequence's last query is at the end of what it sees.
            first, last = keys - count + begin, keys - count + end
            low = max(first - window + 1, 0) if window else 0
            distance = torch.arange(first, last, device=device)[:, None] - torch.arange(
                low, last, device=device
            )
            visible = distance >= 0
            yield _Slice(
                slice(own[number] + begin, own[number] + end),
                slice(seen[number] + low, seen[number] + last),
                visible & (distance < window) if window else visible,
            )


@torch.library.custom_op("kit::attend_by_scores", mutates_args=())
def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
) -> torch.Tensor:
    """Causal attention within each sequence, (T, heads, D of v).

    Args:
        q: (T, heads, D).
        k: (tokens seen, key heads, D); as many heads as q, or a divisor of them.
        v: as k; it may have another D.
        sinks: (heads); None without.
        own_ends: cumulative lengths of the sequences in q, with a leading 0.
        seen_ends: cumulative lengths of the sequences in k and v.
        scale: multiplies the products of queries and keys.
        window: a token sees so many, itself included; 0 is all before it.
        cap: of the soft cap; 0 for none.
    """
    out = q.new_empty(*q.shape[:2], v.shape[-1])
    own_sinks = None if sinks is None else _by_group(sinks, k.shape[1])
    for part in _slices(own_ends, seen_ends, q.shape[1], window):
        query, key, value = _wide(q[part.queries], k[part.keys], v[part.keys])
        scores = torch.einsum("qhgd,khd->hgqk", query, key) * scale
        taken = shares(scores, part.visible, cap, own_sinks)
        mixed = torch.einsum("hgqk,khd->qhgd", taken, value)
        out[part.queries] = mixed.flatten(1, 2).to(out.dtype)
    return out


@attend.register_fake
def _(q: torch.Tensor, _k: torch.Tensor, v: torch.Tensor, *_: Any) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], v.shape[-1])


@torch.library.custom_op("kit::attend_by_scores_backward", mutates_args=())
def _attend_backward(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    scale: float,
    window: int,
    cap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k, v and sinks; an empty tensor where there are no sinks."""
    heads, wide = k.shape[1], _dtype(q)
    dq = torch.empty_like(q)
    dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
    own_sinks = None if sinks is None else _by_group(sinks.to(wide), heads)
    d_sinks = q.new_zeros(0 if sinks is None else len(sinks), dtype=wide)
    for part in _slices(own_ends, seen_ends, q.shape[1], window):
        query, key, value = _wide(q[part.queries], k[part.keys], v[part.keys])
        d_out = gradient[part.queries].to(wide).unflatten(1, (heads, -1))
        scores = torch.einsum("qhgd,khd->hgqk", query, key) * scale
        taken = shares(scores, part.visible, cap, own_sinks)
        d_taken = torch.einsum("qhgd,khd->hgqk", d_out, value)
        # What the softmax takes off each score's gradient; a sink's own value is 0.
        total = (taken * d_taken).sum(-1, keepdim=True)
        d_scores = taken * (d_taken - total)
        if sinks is not None:
            left = 1 - taken.sum(-1, keepdim=True)
            d_sinks -= (left * total).sum((-2, -1)).flatten()
        if cap:
            d_scores = d_scores * (1 - torch.tanh(scores / cap).square())
        dq[part.queries] = (
            (torch.einsum("hgqk,khd->qhgd", d_scores, key) * scale).flatten(1, 2).to(q.dtype)
        )
        dk[part.keys] += torch.einsum("hgqk,qhgd->khd", d_scores, query) * scale
        dv[part.keys] += torch.einsum("hgqk,qhgd->khd", taken, d_out)
    return dq, dk.to(k.dtype), dv.to(v.dtype), d_sinks if sinks is None else d_sinks.to(sinks.dtype)


@_attend_backward.register_fake
def _(
    _gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    d_sinks = q.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), d_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    *tensors, ctx.scale, ctx.window, ctx.cap = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    found = _attend_backward(gradient, *ctx.saved_tensors, ctx.scale, ctx.window, ctx.cap)
    dq, dk, dv, d_sinks = found
    none = None, None, None, None, None
    return (dq, dk, dv, None if ctx.saved_tensors[3] is None else d_sinks, *none)


attend.register_autograd(_gradients, setup_context=_keep)


def _dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype is torch.float64 else torch.float32


def _wide(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All in float32 at least; queries by key head, (queries, key heads, queries of each, D)."""
    q, k, v = (x.to(_dtype(x)) for x in (q, k, v))
    return q.unflatten(1, (k.shape[1], -1)), k, v


def _by_group(sinks: torch.Tensor, key_heads: int) -> torch.Tensor:
    return sinks.view(key_heads, -1, 1, 1)
