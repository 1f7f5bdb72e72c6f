"""Exercises of 08_exactly_zero."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kit.course.verdict import call, hint

ROWS = (32, 96, 256)
ENGINE = ([0, 3], [5, 1], [2, 7])
TRAINER = ([3, 0], [1, 4], [6, 5])


def order_of_a_sum(answer: object) -> str:
    """Such as (1e8, -1e8, 1): the 1 is lost beside a large number, unless it comes last."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 3:
        return "Give three numbers, (a, b, c)."
    if any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in answer):
        return "Give three numbers, (a, b, c)."
    with np.errstate(over="ignore", invalid="ignore"):
        a, b, c = (np.float32(x) for x in answer)
        left, right = (a + b) + c, a + (b + c)
    if not np.isfinite([left, right]).all():
        return "One of the sums is no finite 32-bit number. Smaller ones will do."
    if left != right:
        return ""
    x, y, z = (float(x) for x in answer)
    if (x + y) + z != x + (y + z):
        return f"Those differ in 64 bits; rounded to 32 bits, both sums are {left:g}."
    return f"Both sums are {left:g}. Try numbers of very different sizes."


def rows_in_tiles(answer: object) -> str:
    """One tile, three and eight: 32, 96 and 256 rows."""
    if not isinstance(answer, (tuple, list)) or len(answer) != len(ROWS):
        return "Give three numbers: for 1, for 70 and for 256 requests."
    mistakes = (
        {"One row cannot be computed by itself: the tile is filled up.": 1},
        {
            "Those are the rows that were asked for. The last tile is filled up.": 70,
            "That is the number of tiles. How many rows do they have?": 3,
            "70 rows do not fit into two tiles.": 64,
        },
        {
            "256 rows fill their tiles: nothing is added.": 288,
            "That is the number of tiles. How many rows do they have?": 8,
        },
    )
    for asked, given, right, known in zip((1, 70, 256), answer, ROWS, mistakes, strict=True):
        if wrong := hint(given, right, known):
            return f"For {asked}: {wrong}"
    return ""


def share_of_experts(answer: object) -> str:
    """Over all tokens: the engine's experts that are among the trainer's, through all of them."""
    engine, trainer = [list(x) for x in ENGINE], [list(x) for x in TRAINER]
    in_place = [a == b for ours, theirs in zip(engine, trainer, strict=True)
                for a, b in zip(ours, theirs, strict=True)]  # fmt: skip
    same = [set(ours) == set(theirs) for ours, theirs in zip(engine, trainer, strict=True)]
    return hint(
        call(answer, engine, trainer),
        overlap(engine, trainer),
        {
            "That compares place by place; the order of a token's experts says nothing.": mean(
                in_place
            ),
            "That counts tokens of which all experts agree. Count the experts.": mean(same),
            "That is the number of experts, not their share.": 3.0,
        },
    )


def overlap(engine: Sequence[Sequence[int]], trainer: Sequence[Sequence[int]]) -> float:
    """Share of the first's experts that are the second's, too."""
    pairs = zip(engine, trainer, strict=True)
    return mean([expert in theirs for ours, theirs in pairs for expert in ours])


def mean(values: Sequence[bool]) -> float:
    """Share of those that are true."""
    return sum(values) / len(values)


EXERCISES = (order_of_a_sum, rows_in_tiles, share_of_experts)
