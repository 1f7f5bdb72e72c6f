"""Exercises of 07_what_if."""

from __future__ import annotations

import math

from kit.course.verdict import call, hint, near
from kit.reports.what_if import WhatIf
from kit.utils.formatting import mean

MOST_KL = 0.02
CHANGES = (0.3, -0.2, 0.05, -1.1)


def step_and_version(answer: object) -> str:
    """Step 4 with weights version 6: an undo gives the step back, but no version twice."""
    if not isinstance(answer, (tuple, list)) or len(answer) != 2:
        return "Give two numbers, (step, version)."
    step, version = answer
    if step == 6:
        return "The step is counted back by restore: three, and then one more."
    if step != 4:
        return hint(step, 4, {"That is the step of the snapshot; one was made since.": 3})
    return hint(
        version,
        6,
        {
            "Version 4 is taken: the first of the two undone steps made those weights.": 4,
            "Version 5 is taken: the second of the two undone steps made those weights.": 5,
        },
    )


def largest_rate(answer: object, tried: WhatIf) -> str:
    """The largest learning rate of the trials whose KL is below 0.02."""
    moved = [(t.training.learning_rate, t.movement) for t in tried]
    kl = {rate: m.kl for rate, m in moved if m}
    fitting = [rate for rate, value in kl.items() if value < MOST_KL]
    if not fitting:
        return "" if answer == 0 else "No trial stays below it. Give 0."
    if not isinstance(answer, (int, float)) or isinstance(answer, bool):
        return f"A learning rate is asked for, not {answer!r}."
    right = max(fitting)
    if math.isclose(answer, right, rel_tol=1e-3):
        return ""
    if tried and near(answer, kl[right], 1e-6):
        return "That is the KL itself. Which learning rate led to it?"
    known = [rate for rate in kl if math.isclose(answer, rate, rel_tol=1e-3)]
    if not known:
        return f"{answer:g} was not tried. The rates are {', '.join(f'{r:g}' for r in sorted(kl))}."
    if kl[known[0]] >= MOST_KL:
        return f"Its KL is {kl[known[0]]:.3g}: too far."
    return "It stays below, but so does a larger one."


def kl_of_changes(answer: object) -> str:
    """The mean of exp(change) - 1 - change."""
    given = list(CHANGES)
    k1, k2 = -mean(given), mean([c * c / 2 for c in given])
    k3 = mean([math.expm1(c) - c for c in given])
    turned = mean([math.expm1(-c) + c for c in given])
    return hint(
        call(answer, given),
        k3,
        {
            "That is minus the mean change (k1): right on average, but it can be below 0.": k1,
            "That is the mean of half the squares (k2).": k2,
            "The sign of the change is turned around: the samples are the old policy's.": turned,
            "That is the sum. Divide by the number of tokens.": k3 * len(given),
        },
        tolerance=0.003,
    )


EXERCISES = (step_and_version, largest_rate, kl_of_changes)
