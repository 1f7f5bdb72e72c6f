"""A token for each row of logits, drawn at a temperature, and its log-prob: in one reading of them.

Verifying five drafted tokens of 256 requests has 1,280 rows of logits, of which torch's softmax,
drawing and log-softmax each read and write all several times. So has a step of plain decoding, in
smaller numbers.

A row is split over several programs. Each draws for its columns: the first of exponential clocks
that run at the rates of the probabilities, so that nothing has to be normalised first. The clocks
are made of Philox's numbers, 31 bits each: a token rarer than 1e-9 is drawn too rarely, or not at
all. Philox's key is the request's seed, and it counts by the token's place and the column, so that
no other request, and no other place, has a part in what is drawn. It takes 7 rounds, the fewest
that pass TestU01's BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import math
import os

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

BLOCK = 256
"""Columns that a program takes four of at once: Philox gives four numbers."""
COLUMNS = 4 * 4 * BLOCK
"""Columns of a program."""
ROUNDS = 7
"""Of Philox."""
LEAST: tl.constexpr = tl.constexpr(2.0**-32)
FLOOR: tl.constexpr = tl.constexpr(-1e30)
"""Below every logit, and finite, so that a difference of two of it is a number."""
NOWHERE: tl.constexpr = tl.constexpr(2147483647)
LOG_2: tl.constexpr = tl.constexpr(math.log(2))
FAST: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
"""Whether the device's own logarithm is there, which Triton's interpreter lacks."""


@triton.jit
def _clock(bits):
    """An exponential time, of 32 random bits."""
    share = tl.maximum(tl.uint_to_uniform_float(bits), LEAST)
    # log(1 - share) has no digits left for a small one.
    series = 1 + share * (1 / 2 + share * (1 / 3 + share * (1 / 4 + share * (1 / 5 + share / 6))))
    rest = 1 - share
    logarithm = libdevice.fast_logf(rest) if FAST else tl.log(rest)
    return tl.where(share < 0.0625, share * series, -logarithm)


@triton.jit
def _better(own, value, column, score, best, place):
    """The best of each lane, with some columns more."""
    higher = own > score
    best = tl.where(higher, value, best)
    place = tl.where(higher, column, place)
    return tl.where(higher, own, score), best, place


@triton.jit
def columns_kernel(
    logits, temperatures, seeds, positions, results, places, stride, width, nodes,
    GREEDY: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    """Draw from some columns of a row.

    Writes their maximum, the sum of exponentials below it, the best score and its value, side by
    side, and the best's column. Values are logits / temperature / log(2).
    """
    row, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    lane = tl.arange(0, BLOCK)
    most = tl.full((BLOCK,), FLOOR, tl.float32)
    best = most
    score = tl.full((BLOCK,), float("-inf"), tl.float32) if GREEDY else tl.zeros_like(most)
    total = tl.zeros((BLOCK,), tl.float32)
    place = tl.full((BLOCK,), NOWHERE, tl.int32)
    factor = 1 / LOG_2
    if not GREEDY:
        factor = factor / tl.load(temperatures + row // nodes)
        seed = tl.load(seeds + row // nodes)
        position = tl.load(positions + row).to(tl.int32)
    begin = logits + row.to(tl.int64) * stride
    for first in range(0, COLUMNS, 4 * BLOCK):
        start = part * COLUMNS + first
        column = start + lane
        a = _load(begin, column, width, factor)
        b = _load(begin, column + BLOCK, width, factor)
        c = _load(begin, column + 2 * BLOCK, width, factor)
        d = _load(begin, column + 3 * BLOCK, width, factor)
        higher = tl.maximum(tl.maximum(tl.maximum(a, b), tl.maximum(c, d)), most)
        shrink = tl.exp2(most - higher)
        p, q = tl.exp2(a - higher), tl.exp2(b - higher)
        r, s = tl.exp2(c - higher), tl.exp2(d - higher)
        total = total * shrink + ((p + q) + (r + s))
        if GREEDY:
            p, q, r, s = a, b, c, d
        else:
            # The first clock to ring has the highest rate for its time.
            number = start // 4 + lane
            none = number * 0
            i, j, k, m = tl.philox(seed, number, none + position, none, none, ROUNDS)
            p, q, r, s = p / _clock(i), q / _clock(j), r / _clock(k), s / _clock(m)
            score = score * shrink
        score, best, place = _better(p, a, column, score, best, place)
        score, best, place = _better(q, b, column + BLOCK, score, best, place)
        score, best, place = _better(r, c, column + 2 * BLOCK, score, best, place)
        score, best, place = _better(s, d, column + 3 * BLOCK, score, best, place)
        most = higher
    high = tl.max(most, axis=0)
    shrink = tl.exp2(most - high)
    if not GREEDY:
        score = score * shrink
    top = tl.max(score, axis=0)
    first_place = tl.min(tl.where(score == top, place, NOWHERE), axis=0)
    value = tl.sum(tl.where((score == top) & (place == first_place), best, 0.0), axis=0)
    out = results + (row * parts + part) * 4
    tl.store(out, high)
    tl.store(out + 1, tl.sum(total * shrink, axis=0))
    tl.store(out + 2, top)
    tl.store(out + 3, value)
    tl.store(places + row * parts + part, tl.minimum(first_place, width - 1))  # of NaN


@triton.jit
def _load(begin, column, width, factor):
    """The values of some columns."""
    return tl.load(begin + column, mask=column < width, other=float("-inf")).to(tl.float32) * factor


@triton.jit
def best_kernel(
    results, places, tokens, log_probs, parts, GREEDY: tl.constexpr, PARTS: tl.constexpr
):
    """Take the best token of a row's parts, and its log-prob."""
    row = tl.program_id(0)
    part = tl.arange(0, PARTS)
    known = part < parts
    of = results + (row * parts + part) * 4
    most = tl.load(of, mask=known, other=FLOOR)
    total = tl.load(of + 1, mask=known, other=0.0)
    score = tl.load(of + 2, mask=known, other=float("-inf"))
    value = tl.load(of + 3, mask=known, other=FLOOR)
    place = tl.load(places + row * parts + part, mask=known, other=NOWHERE)
    high = tl.max(most, axis=0)
    shrink = tl.exp2(most - high)
    whole = high + tl.log2(tl.sum(total * shrink, axis=0))
    if not GREEDY:
        score = score * shrink
    best = tl.max(score, axis=0)
    first = tl.min(tl.where(known & (score == best), part, PARTS), axis=0)
    chosen = part == first
    tl.store(tokens + row, tl.sum(tl.where(chosen, place, 0), axis=0).to(tl.int64))
    tl.store(log_probs + row, (tl.sum(tl.where(chosen, value, 0.0), axis=0) - whole) * LOG_2)


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor | None,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    nodes: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw a token from each row, and say its log-prob at the temperature.

    Args:
        logits: (R, vocabulary), on a GPU.
        temperatures: of each request, (R / nodes, 1); None for the likeliest token, whose log-prob
            is then that at temperature 1.
        seeds: of each request, (R / nodes), int64.
        positions: of each row's token, (R) or more.
        nodes: rows of a request, one after the other.

    Returns:
        (tokens, log-probs), (R) each, int64 and float32. A row with a number that is none has NaN.
    """
    rows, width = logits.shape
    parts = triton.cdiv(width, COLUMNS)
    results = logits.new_empty(rows, parts, 4, dtype=torch.float32)
    places = logits.new_empty(rows, parts, dtype=torch.int32)
    tokens = logits.new_empty(rows, dtype=torch.int64)
    log_probs = logits.new_empty(rows, dtype=torch.float32)
    warm = logits if temperatures is None else temperatures.view(-1)
    columns_kernel[(rows, parts)](
        logits, warm, seeds, positions, results, places, logits.stride(0), width, nodes,
        GREEDY=temperatures is None, BLOCK=BLOCK, COLUMNS=COLUMNS, ROUNDS=ROUNDS, num_warps=4,
    )  # fmt: skip
    best_kernel[(rows,)](
        results, places, tokens, log_probs, parts, GREEDY=temperatures is None,
        PARTS=triton.next_power_of_2(parts), num_warps=1,
    )  # fmt: skip
    return tokens, log_probs
