"""Attention of a few new tokens of each request to all before: what verifying drafts takes.

SGLang's Triton kernel gives each head of a request to one program, which reads all that came before
from the first token to the last. That is made for prompts. With five new tokens a head, and two
heads that read the same keys, most of a tile is empty, the keys are read twice, and at 32 requests
of 600 tokens it took most of a pass. Here the new tokens of all heads that share keys are rows of
one tile, and what came before is split over several programs, as for plain decoding.

Read from SGLang 0.5.16:
    kernels/ops/attention/extend_attention.py   extend_attention_fwd, whose arguments these are;
                                       TritonAttnBackend imports it as it is made
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

from inspect import signature
from typing import Any

import torch
import triton
import triton.language as tl

ROWS = 64
"""Most rows of a tile: new tokens times the heads that share keys."""
PROGRAMS, PARTS = 1024, 16
"""About how many programs a GPU is to have, and the most parts into which a request is split."""
COLUMNS = 64
"""Tokens that a program reads at once."""
FLOOR: tl.constexpr = tl.constexpr(-1e30)
"""Below every score, and finite, so that a difference of two of it is a number."""


@triton.jit
def _add(query, key, value, allowed, scale, sums, total, most):
    """Go on with some tokens: (ROWS, SIZE) sums, (ROWS) of their weights, and the highest score."""
    score = tl.dot(query.to(key.dtype), key) * scale
    score = tl.where(allowed, score, FLOOR)
    higher = tl.maximum(most, tl.max(score, axis=1))
    weight = tl.where(allowed, tl.exp(score - higher[:, None]), 0.0)
    shrink = tl.exp(most - higher)
    sums = sums * shrink[:, None] + tl.dot(weight.to(value.dtype), value)
    return sums, total * shrink + tl.sum(weight, axis=1), higher


@triton.jit
def _read(keys, values, place, known, keys_token, values_token, size):
    """Read the keys of some tokens, (SIZE, tokens), and their values, (tokens, SIZE)."""
    key = keys + place[None, :] * keys_token + size[:, None]
    value = values + place[:, None] * values_token + size[None, :]
    return (
        tl.load(key, mask=known[None, :], other=0.0),
        tl.load(value, mask=known[:, None], other=0.0),
    )


@triton.jit
def parts_kernel(
    query, key, value, out, keys, values, new_begins, begins, places, mask, mask_begins, partial,
    logs, scale, query_token, query_head, key_token, key_head, value_token, value_head, out_token,
    out_head, keys_token, keys_head, values_token, values_head, heads, GROUP: tl.constexpr,
    ROWS: tl.constexpr, SIZE: tl.constexpr, COLUMNS: tl.constexpr, OWN: tl.constexpr,
    MASKED: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Attend to a part of what came before a request's new tokens; the last part has these, too."""
    request, shared, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    parts = tl.num_programs(2)
    first = tl.load(new_begins + request)
    count = tl.load(new_begins + request + 1) - first
    begin = tl.load(begins + request)
    before = (tl.load(begins + request + 1) - begin).to(tl.int32)
    row = tl.arange(0, ROWS)
    node, head = row // GROUP, shared * GROUP + row % GROUP
    known = node < count
    token = (first + node).to(tl.int64)
    size = tl.arange(0, SIZE)
    keys, values = keys + shared * keys_head, values + shared * values_head
    key, value = key + shared * key_head, value + shared * value_head
    own = query + token[:, None] * query_token + head[:, None] * query_head + size[None, :]
    tile = tl.load(own, mask=known[:, None], other=0.0)
    sums = tl.zeros((ROWS, SIZE), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    most = tl.full((ROWS,), FLOOR, tl.float32)
    span = tl.cdiv(tl.cdiv(before, parts), COLUMNS) * COLUMNS
    low = part * span
    high = tl.minimum(low + span, before)
    for start in range(low, high, COLUMNS):
        at = start + tl.arange(0, COLUMNS)
        here = at < high
        place = tl.load(places + begin + at, mask=here, other=0).to(tl.int64)
        k, v = _read(keys, values, place, here, keys_token, values_token, size)
        allowed = known[:, None] & here[None, :]
        sums, total, most = _add(tile, k, v, allowed, scale, sums, total, most)
    if part == parts - 1:
        other = tl.arange(0, OWN)
        there = other < count
        at = (first + other).to(tl.int64)
        k, v = _read(key, value, at, there, key_token, value_token, size)
        allowed = known[:, None] & there[None, :]
        if MASKED:
            width = before + count
            seen = mask + tl.load(mask_begins + request) + node[:, None] * width + before
            seen = tl.load(seen + other[None, :], mask=allowed, other=0)
            allowed = allowed & (seen != 0)
        else:
            allowed = allowed & (other[None, :] <= node[:, None])
        sums, total, most = _add(tile, k, v, allowed, scale, sums, total, most)
    shares = sums / tl.where(total > 0, total, 1.0)[:, None]
    if WHOLE:
        to = out + token[:, None] * out_token + head[:, None] * out_head + size[None, :]
        tl.store(to, shares, mask=known[:, None])
    else:
        slot = (token * heads + head) * parts + part
        tl.store(partial + slot[:, None] * SIZE + size[None, :], shares, mask=known[:, None])
        tl.store(logs + slot, tl.where(total > 0, most + tl.log(total), FLOOR), mask=known)


@triton.jit
def together_kernel(
    partial, logs, out, out_token, out_head, parts, PARTS: tl.constexpr, SIZE: tl.constexpr
):
    """Add the parts of a token's head, by the weights that they had."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = (token * tl.num_programs(1) + head) * parts
    part, size = tl.arange(0, PARTS), tl.arange(0, SIZE)
    log = tl.load(logs + slot + part, mask=part < parts, other=FLOOR)
    weight = tl.exp(log - tl.max(log, axis=0))
    weight = weight / tl.sum(weight, axis=0)
    shares = tl.load(
        partial + (slot + part)[:, None] * SIZE + size[None, :],
        mask=(part < parts)[:, None], other=0.0,
    )  # fmt: skip
    tl.store(
        out + token * out_token + head * out_head + size,
        tl.sum(shares * weight[:, None], axis=0),
    )


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    layout: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    masks: tuple[torch.Tensor, torch.Tensor] | None,
    most_new: int,
    scale: float,
) -> None:
    """Have new tokens attend to those before them and among themselves.

    Args:
        query: of T new tokens, (T, heads, D).
        key: theirs, (T, kv heads, D).
        value: likewise.
        out: written, (T, heads, D).
        keys: of all tokens, (places, kv heads, D).
        values: likewise.
        layout: (first new token of each of B requests and after the last, (B + 1); the first place
            of each likewise; the places of what came before).
        masks: whether a new token sees another, flat as SGLang has it, and where each request's
            begins; None: those up to itself.
        most_new: of a request.
        scale: of the scores.
    """
    new_begins, begins, places = layout
    requests, heads, shared = len(new_begins) - 1, query.shape[1], key.shape[1]
    group, size = heads // shared, query.shape[2]
    parts = min(max(PROGRAMS // max(requests * shared, 1), 1), PARTS)
    wide = query.new_empty(0, dtype=torch.float32)
    whole = parts == 1
    partial = out if whole else wide.new_empty(len(query), heads, parts, size)
    logs = out if whole else wide.new_empty(len(query), heads, parts)
    mask, mask_begins = masks or (places, places)
    strides = [t.stride(i) for t in (query, key, value, out, keys, values) for i in (0, 1)]
    parts_kernel[(requests, shared, parts)](
        query, key, value, out, keys, values, new_begins, begins, places, mask, mask_begins,
        partial, logs, scale, *strides, heads, GROUP=group, ROWS=rows_of(most_new, group),
        SIZE=size, COLUMNS=COLUMNS, OWN=max(16, triton.next_power_of_2(most_new)),
        MASKED=masks is not None, WHOLE=whole, num_warps=4, num_stages=2,
    )  # fmt: skip
    if not whole:
        together_kernel[(len(query), heads)](
            partial, logs, out, out.stride(0), out.stride(1), parts,
            PARTS=triton.next_power_of_2(parts), SIZE=size, num_warps=1,
        )  # fmt: skip


def rows_of(most_new: int, group: int) -> int:
    """Rows of a tile for so many new tokens and heads that share keys; a matrix unit takes 16."""
    rows: int = triton.next_power_of_2(most_new * group)
    return max(16, rows)


PLAIN = {
    "k_scale": 1.0,
    "v_scale": 1.0,
    "is_causal": True,
    "logit_cap": 0.0,
    "skip_prefix_custom_mask": True,
    "sliding_window_size": -1,
    "sinks": None,
    "xai_temperature_len": -1,
    "lse_extend": None,
    "skip_prefix": False,
    "skip_extend": False,
    "page_size": 1,
    "score_mod": None,
}
"""What SGLang's kernel is asked for where this one can stand in for it."""


def stands_in(kernels: Any) -> None:
    """Have SGLang's Triton attention call this for a few new tokens, and its own for the rest.

    Args:
        kernels: SGLang's module of the kernel.
    """
    theirs = kernels.extend_attention_fwd
    names = signature(theirs)

    def attend_to_few(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        query, key, most_new = asked["q_extend"], asked["k_extend"], asked["max_len_extend"]
        size, group = query.shape[-1], query.shape[1] // key.shape[1]
        fits = (
            rows_of(most_new, group) <= ROWS
            and size == asked["v_extend"].shape[-1] == triton.next_power_of_2(size)
            and all(asked[name] == value for name, value in PLAIN.items())
        )
        if not fits:
            return theirs(*args, **kwargs)
        masks = asked["custom_mask"], asked["mask_indptr"]
        attend(
            query, key, asked["v_extend"], asked["o_extend"], asked["k_buffer"], asked["v_buffer"],
            (asked["qo_indptr"], asked["kv_indptr"], asked["kv_indices"]),
            None if masks[0] is None else masks, most_new, asked["sm_scale"] or size**-0.5,
        )  # fmt: skip
        return None

    kernels.extend_attention_fwd = attend_to_few
