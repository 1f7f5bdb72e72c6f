"""Exercises of 06_reading_runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kit.course.verdict import hint
from kit.errors import did_you_mean

CAUSES = ("learning rate too high", "learning rate too low", "responses cut", "healthy")
LETTERS = {"A": "responses cut", "B": "learning rate too low", "C": "learning rate too high"}
_CLUES = {
    "A": "read the last two columns. What does a truncated share of 0.93 mean?",
    "B": "nothing has moved, though there is a gradient. What makes steps so small?",
    "C": "reward and entropy both go to 0 within a few steps: it is certain, and wrong.",
}


def name_the_illness(answer: object) -> str:
    """A is cut short, B does not move, C has collapsed."""
    if not isinstance(answer, dict):
        return "Give a dictionary: {'A': ..., 'B': ..., 'C': ...}."
    for letter, right in LETTERS.items():
        given = answer.get(letter, ...)
        if given is ...:
            return f"{letter} has no name yet."
        if given not in CAUSES:
            return f"{letter}: there is no {given!r}. {did_you_mean(str(given), CAUSES)}"
        if given != right:
            return f"{letter} is not {given!r}: {_CLUES[letter]}"
    return ""


def step_it_went_wrong(answer: object, reward: Sequence[float]) -> str:
    """The first step whose reward is below half of the best reward of the steps before it."""
    fallen = [step for step in range(1, len(reward)) if reward[step] < max(reward[:step]) / 2]
    first = fallen[0] if fallen else -1
    lowest = min(range(len(reward)), key=lambda step: reward[step])
    return hint(
        answer,
        first,
        {
            "That is the lowest step. It had fallen before.": lowest,
            "Steps count from 0, so the first row is step 0.": first + 1,
            "That is the step before: its reward was still good.": first - 1,
        },
        tolerance=0.0,
    )


def steps_that_taught_little(answer: object, rows: Sequence[Mapping[str, Any]], groups: int) -> str:
    """Steps of which more than a quarter of the groups had rewards that are all equal."""
    equal = [
        sum(value for name, value in row.items() if name.startswith("rollout/zero_std/"))
        for row in rows
    ]
    right = sum(count > groups / 4 for count in equal)
    others = len(rows) - right
    return hint(
        answer,
        right,
        {
            "Those are the steps with a quarter or less. The others are asked for.": others,
            "Those are the steps with any such group. More "
            "than a quarter of the groups is asked for.": sum(bool(count) for count in equal),
            "That counts groups. Count steps.": sum(equal),
        },
        tolerance=0.0,
    )


EXERCISES = (name_the_illness, step_it_went_wrong, steps_that_taught_little)
