"""Attention of one new token of each request to all before: what a step of decoding takes.

SGLang's Triton kernel reads 32 tokens at a time, and gives every request as many programs as the
longest may need, most of which have nothing to do. Here a program has 16 KiB of keys and as much of
values under way three times over, and of 8 bits 4 KiB five times, which is what keeps a GPU's
memory busy; and requests are split only where there are too few of them to fill the card. So one
program reads a request of 40,000 tokens that is among a hundred short ones, which takes it about
0.3 ms. Keys and values of 8 bits become numbers of 16 bits in one instruction for two, since
float16 holds each of e4m3.

Read from SGLang 0.5.16:
    kernels/ops/attention/decode_attention.py   decode_attention_fwd, whose arguments these are
    layers/attention/triton_backend.py   TritonAttnBackend, which imports it as it is made;
                                         attn_logits, attn_lse: room for the parts of each head
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import os
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
import triton
import triton.language as tl

PROGRAMS = 1024
"""About how many programs fill a GPU; half as many do well enough without splitting requests."""
TILES = {1: (4096, 1, 5), 2: (8192, 2, 3)}
"""By the bytes of a number: numbers of keys that a program reads at once, its warps (more for over
16 heads that share keys), and tiles that it has under way, at most."""
MOST_COLUMNS = 128
ROWS = 64
"""Most heads that share keys."""
PAIRS = os.environ.get("TRITON_INTERPRET") != "1"
"""Whether values in 8 bits are read in pairs; Triton's interpreter lacks the instruction for it."""
FLOOR: tl.constexpr = tl.constexpr(-1e30)
"""Below every score, and finite, so that a difference of two of it is a number."""
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _span(length, parts, COLUMNS: tl.constexpr):
    """Tokens of a part of a request."""
    return tl.cdiv(tl.cdiv(length, parts), COLUMNS) * COLUMNS


@triton.jit
def _values(values, place, here, stride, SIZE: tl.constexpr, PAIRED: tl.constexpr):
    """Values of some places; `PAIRED` has their even and odd numbers apart.

    Matrix units read a tile of values across. A GPU turns numbers of 16 bits as it reads them from
    shared memory, and reads those of 8 bits one by one; so two of them are read as one.
    """
    if PAIRED:
        pairs = values.to(tl.pointer_type(tl.int16))
        pairs += place[:, None] * (stride // 2) + tl.arange(0, SIZE // 2)[None, :]
        both = tl.inline_asm_elementwise(
            "cvt.rn.f16x2.e4m3x2 $0, $1;",
            "=r,h",
            [tl.load(pairs, mask=here[:, None], other=0)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        even = both.to(tl.int16).to(tl.float16, bitcast=True)
        odd = (both >> 16).to(tl.int16).to(tl.float16, bitcast=True)
    else:
        even = values + place[:, None] * stride + tl.arange(0, SIZE)[None, :]
        even = tl.load(even, mask=here[:, None], other=0.0)
        if values.dtype.element_ty.primitive_bitwidth == 8:
            even = even.to(tl.float16)
        odd = even
    return even, odd


@triton.jit
def parts_kernel(
    query, out, keys, values, begins, places, partial, logs, scale, query_token, query_head,
    out_token, out_head, keys_token, keys_head, values_token, values_head, partial_token,
    partial_head, partial_part, logs_token, logs_head, GROUP: tl.constexpr, ROWS: tl.constexpr,
    SIZE: tl.constexpr, COLUMNS: tl.constexpr, STAGES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Attend to a part of a request; where it is the only one, that is the answer."""
    request, shared, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    begin = tl.load(begins + request)
    length = (tl.load(begins + request + 1) - begin).to(tl.int32)
    span = _span(length, tl.num_programs(2), COLUMNS)
    low = part * span
    high = tl.minimum(low + span, length)
    row = tl.arange(0, ROWS)
    head = shared * GROUP + row
    known = row < GROUP
    if low < high:
        size = tl.arange(0, SIZE)
        keys += shared * keys_head
        values += shared * values_head
        own = query + request * query_token + head[:, None] * query_head + size[None, :]
        tile = tl.load(own, mask=known[:, None], other=0.0)
        narrow: tl.constexpr = keys.dtype.element_ty.primitive_bitwidth == 8
        if narrow:
            tile = tile.to(tl.float16)
        paired: tl.constexpr = narrow and PAIRS
        sums = tl.zeros((ROWS, SIZE // 2 if paired else SIZE), tl.float32)
        odd_sums = sums
        total = tl.zeros((ROWS,), tl.float32)
        most = tl.full((ROWS,), FLOOR, tl.float32)
        for start in tl.range(low, high, COLUMNS, num_stages=STAGES):
            at = start + tl.arange(0, COLUMNS)
            here = at < high
            place = tl.load(places + begin + at, mask=here, other=0).to(tl.int64)
            key = keys + place[None, :] * keys_token + size[:, None]
            key = tl.load(key, mask=here[None, :], other=0.0)
            value, odd_value = _values(values, place, here, values_token, SIZE, paired)
            if narrow:
                key = key.to(tl.float16)
            score = tl.where(here[None, :], tl.dot(tile, key) * (scale * LOG2_E), FLOOR)
            higher = tl.maximum(most, tl.max(score, axis=1))
            weight = tl.exp2(score - higher[:, None])
            shrink = tl.exp2(most - higher)
            total = total * shrink + tl.sum(weight, axis=1)
            weight = weight.to(value.dtype)
            sums = sums * shrink[:, None] + tl.dot(weight, value)
            if paired:
                odd_sums = odd_sums * shrink[:, None] + tl.dot(weight, odd_value)
            most = higher
        if paired:
            sums = tl.reshape(tl.join(sums, odd_sums), (ROWS, SIZE))
        shares = sums / total[:, None]
        if span >= length:
            to = out + request * out_token + head[:, None] * out_head + size[None, :]
            tl.store(to, shares, mask=known[:, None])
        else:
            slot = partial + request * partial_token + head * partial_head + part * partial_part
            tl.store(slot[:, None] + size[None, :], shares, mask=known[:, None])
            log = logs + request * logs_token + head * logs_head + part
            tl.store(log, most + tl.log2(total), mask=known)


@triton.jit
def together_kernel(
    out, begins, partial, logs, parts, out_token, out_head, partial_token, partial_head,
    partial_part, logs_token, logs_head, PARTS: tl.constexpr, SIZE: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add the parts of a request's head by the weights that they had, where there are several."""
    request, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = (tl.load(begins + request + 1) - tl.load(begins + request)).to(tl.int32)
    span = _span(length, parts, COLUMNS)
    if span < length:
        part, size = tl.arange(0, PARTS), tl.arange(0, SIZE)
        known = part * span < length
        log = tl.load(logs + request * logs_token + head * logs_head + part, known, FLOOR)
        weight = tl.exp2(log - tl.max(log, axis=0))
        weight = weight / tl.sum(weight, axis=0)
        slot = partial + request * partial_token + head * partial_head + part * partial_part
        shares = tl.load(slot[:, None] + size[None, :], mask=known[:, None], other=0.0)
        summed = tl.sum(shares * weight[:, None], axis=0)
        tl.store(out + request * out_token + head * out_head + size, summed)


def parts_of(programs: int, room: int) -> int:
    """Parts of a request.

    Args:
        programs: that there are if none is divided.
        room: for parts of a request.
    """
    return min(PROGRAMS // programs, room) if 2 * programs < PROGRAMS else 1


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    begins: torch.Tensor,
    places: torch.Tensor,
    partial: torch.Tensor,
    logs: torch.Tensor,
    scale: float,
    stages: int = 2,
) -> None:
    """Have the last token of each request attend to all of it.

    Args:
        query: of B requests, (B, heads, D).
        keys: of all tokens, (places, kv heads, D).
        values: likewise.
        out: written, (B, heads, D).
        begins: the first place of each request and after the last, (B + 1) or more.
        places: of the requests' tokens.
        partial: room for parts, (B or more, heads, parts, D), float32.
        logs: likewise, (B or more, heads, parts).
        scale: of the scores.
        stages: tiles that a program has under way at once.
    """
    count, heads, size = query.shape
    shared = keys.shape[1]
    columns, rows = columns_of(size, keys.element_size()), rows_of(heads // shared)
    warps = max(TILES[keys.element_size()][1], rows // 16)
    parts = parts_of(count * shared, partial.shape[2])
    ends = [tensor.stride(i) for tensor in (query, out, keys, values) for i in (0, 1)]
    room = [*(partial.stride(i) for i in range(3)), logs.stride(0), logs.stride(1)]
    parts_kernel[(count, shared, parts)](
        query, out, keys, values, begins, places, partial, logs, scale, *ends, *room,
        GROUP=heads // shared, ROWS=rows, SIZE=size, COLUMNS=columns,
        STAGES=stages, PAIRS=PAIRS and size >= 32, num_warps=warps,
    )  # fmt: skip
    if parts > 1:
        together_kernel[(count, heads)](
            out, begins, partial, logs, parts, out.stride(0), out.stride(1), *room,
            PARTS=triton.next_power_of_2(parts), SIZE=size, COLUMNS=columns, num_warps=1,
        )  # fmt: skip


def columns_of(size: int, width: int) -> int:
    """Tokens that a program reads at once, of heads of this size and numbers of so many bytes."""
    return min(max(TILES[width][0] // size, 16), MOST_COLUMNS)


def rows_of(group: int) -> int:
    """Rows of a tile for so many heads that share keys; a matrix unit takes 16."""
    rows: int = triton.next_power_of_2(group)
    return max(16, rows)


def stages_of(size: int, width: int, memory: int) -> int:
    """Tiles of heads of this size that may be under way at once; 0 where there is no room.

    Args:
        size: of a head.
        width: bytes of a number of keys and values.
        memory: that a program may share, in bytes.
    """
    tiles: int = (memory - 8192) // (2 * columns_of(size, width) * size * width)
    return min(tiles, TILES[width][2]) if tiles >= 2 else 0


@cache
def shared_memory(device: int) -> int:
    """Bytes that a program on a GPU may share."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    size: int = properties["max_shared_mem"]
    return size


PLAIN = {
    "v_scale": 1.0,
    "logit_cap": 0.0,
    "sinks": None,
    "xai_temperature_len": -1,
    "has_mla": False,
    "page_size": 1,
    "score_mod": None,
}
"""What SGLang's kernel is asked for where this one can stand in for it."""


def standing_in(theirs: Any) -> Any:
    """This kernel in place of SGLang's `decode_attention_fwd`, which still does the rest."""
    names = signature(theirs)

    def attend_to_all(*args: Any, **kwargs: Any) -> Any:
        given = names.bind(*args, **kwargs)
        given.apply_defaults()
        asked = given.arguments
        query, keys, values = asked["q"], asked["k_buffer"], asked["v_buffer"]
        if not (fits(query, keys, values, asked["o"]) and is_plain(asked)):
            return theirs(*args, **kwargs)
        stages = stages_of(query.shape[-1], keys.element_size(), shared_memory(query.device.index))
        if not stages:
            return theirs(*args, **kwargs)
        attend(
            query, keys, values, asked["o"], asked["kv_indptr"], asked["kv_indices"],
            asked["attn_logits"], asked["attn_lse"], asked["sm_scale"] * asked["k_scale"],
            stages,
        )  # fmt: skip
        return None

    return attend_to_all


def fits(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether the kernel takes heads of this kind."""
    size, heads = query.shape[-1], query.shape[1]
    return (
        keys.dim() == values.dim() == 3
        and 16 <= size == values.shape[-1] == triton.next_power_of_2(size) <= 256
        and heads // keys.shape[1] <= ROWS
        and query.dtype == out.dtype == torch.bfloat16
        and keys.dtype in (torch.bfloat16, torch.float8_e4m3fn)
        and all(tensor.stride(-1) == 1 for tensor in (query, keys, values, out))
    )


def is_plain(asked: dict[str, Any]) -> bool:
    """Whether these arguments of SGLang's kernel ask for attention and nothing else."""
    return all(asked[name] == value for name, value in PLAIN.items())


def register() -> None:
    """Have this process' SGLang decode with it, where its attention is Triton's."""
    kernels: Any = import_module("sglang.kernels.ops.attention.decode_attention")
    kernels.decode_attention_fwd = standing_in(kernels.decode_attention_fwd)
