"""Queries, keys and values of new tokens, made ready for attention by one kernel.

Where each head of queries and keys is normed before it is rotated, as in Qwen3, SGLang takes three
kernels: for the norms, for the rotation and for writing keys and values to their places in the
cache; and two more for a cache in FP8, which convert them. Each has little to do for a step of
decoding, and each is waited for. Here a program norms and rotates some heads of a token, and writes
those of keys, and their values, to the cache.

The numbers are SGLang's: what is normed is rounded to bfloat16 before it is rotated, and what is
rotated before it is converted to the cache's dtype. Numbers beyond those of e4m3 become NaN, as
torch's conversion has them.

    relies on   models/qwen3.py: Qwen3Attention.forward, and the names of its parts
                models/utils.py: apply_qk_norm
                layers/rotary_embedding/base.py: RotaryEmbedding.forward_cuda, cos_sin_cache
                mem_cache/memory_pool.py: MHATokenToKVPool.set_kv_buffer, get_kv_buffer
                model_executor/forward_context.py: get_token_to_kv_pool
                model_executor/model_runner.py: ModelRunner.load_model
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 8
"""Heads of a token that one program makes ready, at most."""
SIZES = (64, 128, 256)
"""Sizes of heads for which SGLang has the kernel whose bits these are."""
LARGEST: tl.constexpr = tl.constexpr(464.0)
"""What is larger is rounded to a number that e4m3 does not have."""


@triton.jit
def _lanes(squares, ROWS: tl.constexpr, EACH: tl.constexpr):
    """Sums of so many neighbours each, from the first to the last; (ROWS, 16)."""
    if EACH == 2:
        a, b = tl.split(tl.reshape(squares, (ROWS, 16, 2)))
        total = a + b
    elif EACH == 4:
        even, odd = tl.split(tl.reshape(squares, (ROWS, 16, 2, 2)))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        total = ((a + b) + c) + d
    else:
        even, odd = tl.split(tl.reshape(squares, (ROWS, 16, 2, 2, 2)))
        even, more_even = tl.split(even)
        odd, more_odd = tl.split(odd)
        a, e = tl.split(even)
        c, g = tl.split(more_even)
        b, f = tl.split(odd)
        d, h = tl.split(more_odd)
        total = ((((((a + b) + c) + d) + e) + f) + g) + h
    return total


@triton.jit
def _sum(first, second, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Sum of the squares of both halves of heads, in the order of SGLang's kernel.

    There each lane of a warp adds its own neighbours, and lanes are added to those that are 16, 8,
    4, 2 and 1 further on.
    """
    EACH: tl.constexpr = HALF // 16
    total = _lanes(first * first, ROWS, EACH) + _lanes(second * second, ROWS, EACH)
    total = tl.sum(tl.reshape(total, (ROWS, 2, 8)), axis=1)
    total = tl.sum(tl.reshape(total, (ROWS, 2, 4)), axis=1)
    total = tl.sum(tl.reshape(total, (ROWS, 2, 2)), axis=1)
    return tl.sum(total, axis=1)


@triton.jit
def _rotated(heads, weight, cosine, sine, eps, ROWS: tl.constexpr, HALF: tl.constexpr):
    """Both halves of some heads, normed and rotated, written back; what was written."""
    column = tl.arange(0, HALF)
    at = heads[:, None] + column[None, :]
    kind: tl.constexpr = heads.dtype.element_ty
    first, second = tl.load(at).to(tl.float32), tl.load(at + HALF).to(tl.float32)
    share: tl.constexpr = 0.5 / HALF  # a division by a constant is none of the exact ones
    length = tl.rsqrt(_sum(first, second, ROWS, HALF) * share + eps)[:, None]
    factor = tl.load(weight + column).to(tl.float32)[None, :]
    more_factor = tl.load(weight + HALF + column).to(tl.float32)[None, :]
    first = (first * length * factor).to(kind).to(tl.float32)
    second = (second * length * more_factor).to(kind).to(tl.float32)
    cosine = tl.broadcast_to(cosine[None, :], (ROWS, HALF))
    sine = tl.broadcast_to(sine[None, :], (ROWS, HALF))
    turned = tl.fma(first, cosine, -(second * sine)).to(kind)
    more_turned = tl.fma(second, cosine, first * sine).to(kind)
    tl.store(at, turned)
    tl.store(at + HALF, more_turned)
    return turned, more_turned


@triton.jit
def _cached(value, kind: tl.constexpr):
    """A number as the cache has it."""
    if kind == tl.float8e4nv:
        wide = value.to(tl.float32)
        value = tl.where(tl.abs(wide) > LARGEST, float("nan"), wide)
    return value.to(kind)


@triton.jit
def norm_rotation_kernel(
    qkv, positions, places, table, query_weight, key_weight, keys, values, eps, stride,
    keys_stride, values_stride, HEADS: tl.constexpr, SHARED: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate some heads of a token in place, and write those of keys to the cache."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, HALF)
    angle = table + tl.load(positions + token).to(tl.int64) * (2 * HALF) + column
    cosine, sine = tl.load(angle), tl.load(angle + HALF)
    head = part * ROWS + tl.arange(0, ROWS)
    heads = qkv + token * stride + head * (2 * HALF)
    if part < HEADS // ROWS:
        _rotated(heads, query_weight, cosine, sine, eps, ROWS, HALF)
    else:
        own = heads[:, None] + SHARED * (2 * HALF) + column[None, :]
        value, more_value = tl.load(own), tl.load(own + HALF)
        key, more_key = _rotated(heads, key_weight, cosine, sine, eps, ROWS, HALF)
        place = tl.load(places + token).to(tl.int64)
        inner = (head - HEADS)[:, None] * (2 * HALF) + column[None, :]
        kind: tl.constexpr = keys.dtype.element_ty
        tl.store(keys + place * keys_stride + inner, _cached(key, kind))
        tl.store(keys + place * keys_stride + inner + HALF, _cached(more_key, kind))
        tl.store(values + place * values_stride + inner, _cached(value, kind))
        tl.store(values + place * values_stride + inner + HALF, _cached(more_value, kind))


def make_ready(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    places: torch.Tensor,
    table: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Norm and rotate queries and keys in place, and write keys and values to the cache.

    Args:
        qkv: queries, keys and values of T tokens side by side, (T, (heads + 2 * kv heads) * D).
        positions: of the tokens, (T).
        places: of the tokens in the cache, (T).
        table: cosines and sines of each position, (positions, D), float32.
        weights: of the norms of queries and of keys, (D) each.
        eps: of the norms.
        keys: the cache's, (places, kv heads, D), bfloat16 or e4m3; written.
        values: likewise.
    """
    tokens, width = qkv.shape
    shared, size = keys.shape[1], keys.shape[2]
    heads = width // size - 2 * shared
    rows = math.gcd(ROWS, heads, shared)
    norm_rotation_kernel[(tokens, (heads + shared) // rows)](
        qkv, positions, places, table, *weights, keys, values, eps, qkv.stride(0), keys.stride(0),
        values.stride(0), HEADS=heads, SHARED=shared, HALF=size // 2, ROWS=rows,
        num_warps=max(1, rows // 2),
        enable_fp_fusion=False,
    )  # fmt: skip


def fits(attention: Any) -> bool:
    """Whether the kernel computes what a `Qwen3Attention` does before its attention."""
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    rotary, norms = attention.rotary_emb, (attention.q_norm, attention.k_norm)
    return (
        type(rotary).forward_cuda is RotaryEmbedding.forward_cuda
        and not rotary.use_fallback_kernel
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == attention.head_dim
        and attention.head_dim in SIZES
        and rotary.cos_sin_cache.dtype == torch.float32
        and all(type(norm) is RMSNorm for norm in norms)
        and all(norm.weight.dtype == torch.bfloat16 for norm in norms)
        and norms[0].variance_epsilon == norms[1].variance_epsilon
        and attention.attn.k_scale is attention.attn.v_scale is None
    )


def is_plain(pool: Any) -> bool:
    """Whether a cache has keys and values of each token side by side, in a dtype of the kernel."""
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    return (
        type(pool) is MHATokenToKVPool
        and pool.kv_cache_layout == "nhd"
        and not pool.is_quantized_kv_cache
        and pool.dtype in (torch.bfloat16, torch.float8_e4m3fn)
    )


def forward(
    attention: Any, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: Any
) -> torch.Tensor:
    """`Qwen3Attention.forward`; where tokens are written, with the kernel."""
    from sglang.srt.model_executor.forward_context import get_token_to_kv_pool

    pool = get_token_to_kv_pool()
    if not (forward_batch.forward_mode.is_decode() and is_plain(pool)):
        whole: torch.Tensor = type(attention).forward(
            attention, positions, hidden_states, forward_batch
        )
        return whole
    qkv, _ = attention.qkv_proj(hidden_states)
    make_ready(
        qkv,
        positions,
        forward_batch.out_cache_loc,
        attention.rotary_emb.cos_sin_cache,
        (attention.q_norm.weight, attention.k_norm.weight),
        attention.q_norm.variance_epsilon,
        *pool.get_kv_buffer(attention.attn.layer_id),
    )
    q, k, v = qkv.split([attention.q_size, attention.kv_size, attention.kv_size], dim=-1)
    attended = attention.attn(q, k, v, forward_batch, save_kv_cache=False)
    output: torch.Tensor = attention.o_proj(attended)[0]
    return output


def register() -> None:
    """Have the models that this process loads from now on do so, where they are Qwen3's.

    It was not compared with drafts, of which several tokens of a request are written at once.
    """
    from sglang.srt.model_executor.model_runner import ModelRunner

    load = ModelRunner.load_model

    def load_and_place(self: Any) -> Any:
        loaded = load(self)
        kind = getattr(sys.modules.get("sglang.srt.models.qwen3"), "Qwen3Attention", None)
        if kind and self.server_args.dcp_size == 1:
            for part in self.model.modules():
                if isinstance(part, kind) and fits(part):
                    part.forward = partial(forward, part)
        return loaded

    ModelRunner.load_model = load_and_place
