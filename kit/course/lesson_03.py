"""Exercises of 03_why_log_probs_differ."""

from __future__ import annotations

import math
from typing import get_args

from kit.course.verdict import call, hint, near
from kit.errors import did_you_mean
from kit.reports import Cause

REPORTS = {"A": "stale_weights", "B": "tokenization", "C": "temperature"}


def ratio_of_a_token(answer: object) -> str:
    """exp(-0.9 - -0.7) = 0.819."""
    return hint(
        answer,
        math.exp(-0.2),
        {
            "That is the engine over the trainer. The trainer is on top.": math.exp(0.2),
            "That is the difference of the log-probs. The exponential of it is the ratio.": -0.2,
            "That is a difference of log-probs. The exponential of trainer minus engine is "
            "the ratio.": 0.2,
            "That divides log-probs. Probabilities are their exponentials: divide those.": 9 / 7,
        },
        tolerance=0.005,
    )


def three_reports(answer: object) -> str:
    """A: the engine is a version behind. B: the text was encoded again. C: another temperature."""
    if not isinstance(answer, dict):
        return "Give a dictionary: {'A': ..., 'B': ..., 'C': ...}."
    known = get_args(Cause)
    for letter, right in REPORTS.items():
        given = answer.get(letter, "")
        if given is ... or not given:
            return f"{letter} has no cause yet."
        if given not in known:
            return f"{letter}: no cause is called {given!r}. {did_you_mean(str(given), known)}"
        if given != right:
            return f"{letter} is not {given}: {_CLUES[letter]}"
    return ""


_CLUES = {
    "A": "look at the two version numbers.",
    "B": "what happens to the special token at the end, when only the text is kept?",
    "C": "all of it fits after one division. What are logits divided by before sampling?",
}


def effective_sample_size(answer: object) -> str:
    """With w = exp(log_ratio): (sum of w) squared, over n times the sum of w squared."""
    if not near(equal := call(answer, [0.0] * 4), 1.0):
        if near(equal, 4.0):
            return "Four equal weights give 4: the effective number. Divide by n for the share."
        return f"Four log-ratios of 0 are four equal weights: the share is 1, yours is {equal!r}."
    if not near(shifted := call(answer, [1.0, 1.0]), 1.0):
        return f"Log-ratios [1, 1] are equal weights too: the share is 1, yours is {shifted!r}."
    lone = call(answer, [0.0, -30.0, -30.0, -30.0])
    if not near(lone, 0.25):
        return (
            f"Log-ratios [0, -30, -30, -30]: one token has all the weight, so the share is 1/4; "
            f"yours is {lone!r}. Are the weights exp(log_ratio)?"
        )
    mixed = call(answer, [0.0, math.log(3.0)])
    if not near(mixed, 0.8):
        return f"Weights 1 and 3 leave 16 / (2 * 10) = 0.8; yours is {mixed!r}."
    return ""


EXERCISES = (ratio_of_a_token, three_reports, effective_sample_size)
