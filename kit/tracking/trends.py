"""Trends of a run that deserve a second look: what no single step's metrics can show.

A step is compared with those before it. Each rule is over means of a few steps, as one alone says
little, and wants a change larger than the steps vary by anyway.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from statistics import fmean, median

from kit.reports import REWARD
from kit.utils.formatting import number

SPAN = 3
"""Steps whose mean is compared."""
FALL = 0.15
"""Share of the best reward that a fall has to exceed."""
NOISE = 3.0
"""Multiple of the usual difference of two neighbouring steps that a fall has to exceed."""
ENTROPY, LENGTH = "train/entropy_loss", "rollout/response_len/mean"
COLLAPSED = 0.2
"""Share of its first entropy at which a policy has collapsed, unless it is right by then."""
ROSE = 2.0
"""Multiple of its first entropy at which a policy dissolves."""
LENGTH_FACTOR = 2.0
"""Factor by which a length grows or shrinks suddenly,"""
WITHIN = 10
"""if it does so within this many steps."""


def trends(history: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Every metric whose course up to the last row deserves a second look, and why."""
    found = {
        REWARD: _fallen(_values(history, REWARD)),
        ENTROPY: _entropy(history),
        LENGTH: _length(_values(history, LENGTH)[-WITHIN:]),
    }
    return {name: why for name, why in found.items() if why}


def _values(history: Sequence[Mapping[str, float]], name: str) -> list[float]:
    values = (row.get(name) for row in history)
    return [float(value) for value in values if value is not None and math.isfinite(value)]


def _means(values: Sequence[float]) -> list[float]:
    """Running means over `SPAN` values."""
    return [fmean(values[i : i + SPAN]) for i in range(len(values) - SPAN + 1)]


def _fallen(values: Sequence[float]) -> str:
    """Why a reward is one that fell; empty where it did not."""
    if len(values) < SPAN + 1:
        return ""
    means = _means(values)
    best, last = max(means), means[-1]
    usual = median(abs(a - b) for a, b in pairwise(values))
    if best - last <= max(FALL * abs(best), NOISE * usual):
        return ""
    at = means.index(best) + SPAN - 1
    return (
        f"fell from {number(best)} to {number(last)} in {len(values) - 1 - at} steps (means of "
        f"{SPAN} steps): the updates may be too large; go back to a snapshot or checkpoint, and "
        "lower learning_rate"
    )


def _entropy(history: Sequence[Mapping[str, float]]) -> str:
    values, rewards = _values(history, ENTROPY), _values(history, REWARD)
    if len(values) < 2 * SPAN:
        return ""
    means = _means(values)
    first, last = means[0], means[-1]
    learned = len(rewards) >= 2 * SPAN and not _fallen(rewards)
    learned = learned and _means(rewards)[-1] > _means(rewards)[0]
    if last < COLLAPSED * first and not learned:
        return (
            f"collapsed from {number(first)} to {number(last)} nats a token while the reward did "
            "not rise: it explores no more; lower learning_rate, or set entropy_coef"
        )
    if last > ROSE * first:
        return (
            f"rose from {number(first)} to {number(last)} nats a token: the policy dissolves; "
            "lower learning_rate or entropy_coef"
        )
    return ""


def _length(values: Sequence[float]) -> str:
    if len(values) < 2 * SPAN:
        return ""
    means = _means(values)
    first, last = means[0], means[-1]
    if not 1 / LENGTH_FACTOR < last / max(first, 1e-9) < LENGTH_FACTOR:
        return (
            f"went from {number(first)} to {number(last)} tokens in {len(values) - SPAN} steps: "
            "read the responses; rewards can be gamed by length"
        )
    return ""
