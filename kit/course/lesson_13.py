"""Exercises of 13_speculative."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral

from kit.course.verdict import call, hint

RIGHT, LENGTH = 0.5, 3
OWN = [7, 2, 5, 4, 1]
GIVEN = [7, 2, 5]
LONGEST = 20
CASES = ((0.5, 0.1), (0.8, 0.05), (0.3, 0.5), (0.9, 0.2))
"""(chance that a token is right, cost of a token)."""


def tokens_a_pass(answer: object) -> str:
    """1.875: the model's own, and 1/2 + 1/4 + 1/8 of the draft."""
    of_draft = sum(RIGHT**place for place in range(1, LENGTH + 1))
    return hint(
        answer,
        1 + of_draft,
        {
            "The model's own token is missing: a pass gives one at least.": of_draft,
            "The second counts only if the first was right, too.": 1 + LENGTH * RIGHT,
            "The second counts only if the first was right, and the model's own is missing.": (
                LENGTH * RIGHT
            ),
            "That has only drafts that are right to the end. The others give something, too.": (
                1 + RIGHT**LENGTH
            ),
            "That has only the first token of the draft, and the model's own.": 1 + RIGHT,
            "That goes one place too far: the draft has three tokens.": 1 + of_draft + RIGHT**4,
        },
    )


def one_pass(answer: object) -> str:
    """[7, 2, 5]: two are right, and 5 is the model's own in place of the third."""
    if not isinstance(answer, Sequence) or isinstance(answer, str):
        return "Give a list of tokens, such as [7, 2]."
    given = list(answer)
    if given == GIVEN:
        return ""
    mistakes: dict[tuple[object, ...], str] = {
        (
            7,
            2,
        ): "Those are the accepted ones. The pass gives the model's own token after them, too.",
        (7, 2, 9): "9 was drafted, and the model drew 5 in its place.",
        (7, 2, 9, 4): "That is the draft. The model drew 5 where it has 9.",
        (7, 2, 4): "4 was drawn after 9, which is not in the text.",
        (7, 2, 5, 4): "4 was drawn after 9, and there is 5 now. That 4 is right there is chance.",
        tuple(OWN): "4 and 1 were drawn for a text with 9 in it, which is not there any more.",
        (5,): "The two that were right are kept.",
    }
    return mistakes.get(tuple(given), "Compare from the left, and stop at the first that differs.")


def best_length(answer: object) -> str:
    """The k from 0 to 20 with the largest (1 + r + ... + r^k) / (1 + k c)."""

    def tokens(right: float, length: int) -> float:
        return sum(right**place for place in range(length + 1))

    ways: dict[str, Callable[[float, float, int], float]] = {
        "": lambda r, c, k: tokens(r, k) / (1 + k * c),
        "That takes the most tokens. Divide by what they cost.": lambda r, c, k: tokens(r, k),
        "The second token counts only if the first was right, too.": (
            lambda r, c, k: (1 + k * r) / (1 + k * c)
        ),
        "The model's own token is missing: a pass gives one at least.": (
            lambda r, c, k: (tokens(r, k) - 1) / (1 + k * c)
        ),
        "A pass of the model has its cost as well: 1, beside k c of the draft.": (
            lambda r, c, k: tokens(r, k) / (k * c) if k else 0.0
        ),
        "That takes the cost off. How many times as fast is a ratio.": (
            lambda r, c, k: tokens(r, k) - k * c
        ),
        "No draft at all is one of the lengths: 0.": (
            lambda r, c, k: tokens(r, k) / (1 + k * c) if k else 0.0
        ),
    }
    given = [call(answer, *case) for case in CASES]
    for case, length in zip(CASES, given, strict=True):
        if isinstance(length, bool) or not isinstance(length, Integral):
            return f"A whole number is asked for; for {case} yours gives {length!r}."
    right = [_best(ways[""], *case) for case in CASES]
    for words, speed in ways.items():
        if given == [_best(speed, *case) for case in CASES]:
            return words
    case, length, wrong = next(
        (c, k, g) for c, k, g in zip(CASES, right, given, strict=True) if k != g
    )
    return f"For a chance of {case[0]} and a cost of {case[1]} it is {length}; yours gives {wrong}."


def _best(speed: Callable[[float, float, int], float], right: float, cost: float) -> int:
    """The length from 0 to 20 that is fastest, the shortest of several."""
    return max(range(LONGEST + 1), key=lambda length: speed(right, cost, length))


EXERCISES = (tokens_a_pass, one_pass, best_length)
