"""The operators on a CPU: products over tiles of fixed size, everything else row by row.

What torch's library for products gives a row depends on the number of rows, so each product here
is made of tiles of the same shape, the last one padded with zeros. Elementwise functions whose last
elements torch computes by other code than the rest (`silu`, `rsqrt`) are written in terms of ones
that are rounded exactly or are computed by one code throughout.

Shapes: T rows, S sequences, Q queries and K keys of each at most, H query heads, G key heads, D
head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from kit.operators.rope import Angles

ROWS = 32
"""Rows in a tile of a product."""
QUERIES = 8
"""Rows in a tile of attention: queries, and heads that have their keys in common."""
KEYS = 64
"""Keys in a tile of attention."""


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Product of x (..., K) with weight (N, K), plus bias (N); (..., N)."""
    rows = x.reshape(-1, x.shape[-1])
    product: torch.Tensor = _Product.apply(rows, weight)  # type: ignore[no-untyped-call]
    whole = product.view(*x.shape[:-1], len(weight))
    return whole if bias is None else whole + bias


class _Product(torch.autograd.Function):
    """The product in tiles; its gradient in one piece, where nothing has to agree."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        return tiled_product(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        of_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def tiled_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Product of x (T, K) with weight (N, K), in tiles of `ROWS` rows; (T, N)."""
    count = len(x)
    tiles = pad(x, (0, 0, 0, -count % ROWS)).view(-1, ROWS, x.shape[1])
    each = weight.T[None].expand(len(tiles), -1, -1)
    return torch.bmm(tiles, each).view(-1, len(weight))[:count]


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension: x / sqrt(mean(x^2) + eps) * weight."""
    wide = x.float()
    length = (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    return (wide / length * weight.float()).to(x.dtype)


def rotate(
    q: torch.Tensor, k: torch.Tensor, angles: Angles, position_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each pair (i, i + D/2) of q (T, H, D) and k (T, G, D) by its position's angle."""
    cos, sin = (part[:, None] for part in angles.at(position_T))
    return _rotate(q, cos, sin), _rotate(k, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def silu_and_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sigmoid-weighted unit: gate / (1 + exp(-gate)) * up."""
    wide = gate.contiguous().float()
    return (wide / ((-wide).exp() + 1) * up.float()).to(gate.dtype)


def route(
    logits: torch.Tensor, top_k: int, *, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each row, by number, and their weights, (T, top_k) each; weights are float32.

    Args:
        logits: of each expert, (T, experts).
        top_k: experts of a row.
        normalizes: whether a row's weights are made to sum to 1.
    """
    shares = logits.float().softmax(-1)
    chosen = shares.topk(top_k, dim=-1).indices.sort(-1).values  # so that sums have one order
    weights = shares.gather(-1, chosen)
    return (weights / _sum_of(weights)[:, None] if normalizes else weights), chosen


def _sum_of(weights: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension, from its first place to its last."""
    total = weights[:, 0]
    for column in weights.unbind(-1)[1:]:
        total = total + column
    return total


def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the gated units of each row's experts, in the order of `chosen`; (T, K).

    Args:
        x: (T, K).
        gate_up: the stacked first weights of each expert, (experts, 2 N, K).
        down: its last weight, (experts, K, N).
        weights: of each row's experts, (T, top_k), float32.
        chosen: their numbers, (T, top_k).
    """
    parts = x.new_zeros(*chosen.shape, x.shape[1])
    for number in chosen.unique().tolist():
        row, place = torch.where(chosen == number)
        gate, up = gate_up[number].chunk(2)
        inner = silu_and_multiply(linear(x[row], gate), linear(x[row], up))
        parts = parts.index_put((row, place), linear(inner, down[number]))
    weighted = parts.float() * weights[:, :, None]
    total = weighted[:, 0]
    for part in weighted.unbind(1)[1:]:
        total = total + part
    return total.to(x.dtype)


def log_softmax(logits: torch.Tensor, temperature: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Logarithm of the softmax of logits / temperature over the last dimension, float32.

    Args:
        logits: (rows, vocabulary).
        temperature: of each row, (rows, 1), or of all.
    """
    divisor = torch.as_tensor(temperature, dtype=torch.float32, device=logits.device)
    return torch.log_softmax(logits.float().contiguous() / divisor, dim=-1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_S: torch.Tensor, scale: float
) -> torch.Tensor:
    """Causal attention of some queries of each sequence to its keys.

    Args:
        q: (S, Q, H, D); padding comes last.
        k: (S, K, G, D), from the sequence's first token on; padding comes last, and is finite.
        v: as k.
        first_S: place of each sequence's first query; query i sees the keys 0 to first + i.
        scale: multiplies the products of queries and keys.

    Returns:
        (S, Q, H, D) in q's dtype.
    """
    attended: torch.Tensor = _Attention.apply(q, k, v, first_S, scale)  # type: ignore[no-untyped-call]
    return attended


class _Attention(torch.autograd.Function):
    """Attention in tiles; the gradient is that of torch's own, computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        first_S: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v, first_S)
        ctx.scale = scale
        return tiled_attention(q, k, v, first_S, scale)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, first_S = ctx.saved_tensors
        q, k, v = (x.detach().requires_grad_() for x in inputs)
        place = first_S[:, None] + torch.arange(q.shape[1])
        visible = torch.arange(k.shape[1]) <= place[:, :, None]
        with torch.enable_grad():
            out = scaled_dot_product_attention(
                q.transpose(1, 2),
                k.transpose(1, 2),
                v.transpose(1, 2),
                attn_mask=visible[:, None],
                scale=ctx.scale,
                enable_gqa=True,
            ).transpose(1, 2)
        return *torch.autograd.grad(out, (q, k, v), gradient), None, None


def tiled_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_S: torch.Tensor, scale: float
) -> torch.Tensor:
    """Attention as `attend` describes it, without a gradient.

    A tile has `QUERIES` rows, heads with common keys side by side. It meets the keys `KEYS` at a
    time, in their order; what it meets beyond its own place adds exact zeros.
    """
    sequences, queries, heads, size = q.shape
    groups, shared = k.shape[2], heads // k.shape[2]
    rows = q.float().view(sequences, queries, groups, shared, size).transpose(1, 2)
    rows = rows.reshape(sequences * groups, queries * shared, size)
    place = (first_S[:, None] + torch.arange(queries)).clamp_(max=k.shape[1] - 1)  # of padding
    place = place.repeat_interleave(shared, dim=1).repeat_interleave(groups, dim=0)
    count = rows.shape[1]
    rows, place = pad(rows, (0, 0, 0, -count % QUERIES)), pad(place, (0, -count % QUERIES))
    keys, values = (_tiles_of_keys(x) for x in (k, v))
    tiles = []
    for start in range(0, count, QUERIES):
        part = slice(start, start + QUERIES)
        tiles.append(_attend_tile(rows[:, part].contiguous(), place[:, part], keys, values, scale))
    out = torch.cat(tiles, dim=1)[:, :count].view(sequences, groups, queries, shared, size)
    return out.transpose(1, 2).reshape(q.shape).to(q.dtype)


def _tiles_of_keys(x: torch.Tensor) -> list[torch.Tensor]:
    """Keys or values (S, K, G, D) as tiles (S * G, `KEYS`, D)."""
    flat = x.float().transpose(1, 2).flatten(0, 1)
    return [tile.contiguous() for tile in pad(flat, (0, 0, 0, -x.shape[1] % KEYS)).split(KEYS, 1)]


def _attend_tile(
    rows: torch.Tensor,
    place: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """Attention of one tile of queries (S * G, `QUERIES`, D), whose places are given."""
    scores = []
    for start in range(0, int(place.max()) + 1, KEYS):
        score = torch.bmm(rows, keys[start // KEYS].transpose(1, 2)).mul_(scale)
        hidden = torch.arange(start, start + KEYS) > place[:, :, None]
        scores.append(score.masked_fill_(hidden, -torch.inf))
    top = scores[0].amax(-1, keepdim=True)
    for score in scores[1:]:
        top = torch.maximum(top, score.amax(-1, keepdim=True))
    shares = [score.sub_(top).exp_() for score in scores]
    total, out = shares[0].sum(-1, keepdim=True), torch.bmm(shares[0], values[0])
    for share, value in zip(shares[1:], values[1 : len(shares)], strict=True):
        total, out = total + share.sum(-1, keepdim=True), out + torch.bmm(share, value)
    return out / total
