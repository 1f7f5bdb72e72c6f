"""Statistics of the differences: quantiles, curves over position and probability, ratios."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from kit.reports import CurvePoint, TokenDifference
from kit.samples.token_values import LARGEST_LOG_RATIO

QUANTILES = (0.5, 0.9, 0.99, 0.999)
MOST_POINTS = 32
"""Places of a response are put together where it has more."""
PROBABILITIES = (0.0, 1e-3, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
"""Edges of the classes of the engine's probability."""


def badness(difference: float) -> float:
    """Sort key of a difference; NaN counts as the worst."""
    return math.inf if math.isnan(difference) else abs(difference)


def mean(values: Sequence[float]) -> float:
    """Mean, exactly rounded; 0 without values."""
    return math.fsum(values) / len(values) if values else 0.0


def quantiles(gaps: Iterable[float]) -> dict[float, float]:
    """Quantiles of |trainer - rollout|, by share of tokens.

    The value is one that occurs (the nearest rank), so that it can be found among the tokens.
    """
    ordered = sorted(gaps, key=badness)
    if not ordered:
        return {}
    return {q: ordered[max(math.ceil(q * len(ordered)) - 1, 0)] for q in QUANTILES}


def by_position(differences: Sequence[TokenDifference]) -> tuple[CurvePoint, ...]:
    """Mean |difference| by position in the response; drift shows as a rise."""
    if not differences:
        return ()
    places = max(d.position for d in differences) + 1
    width = -(-places // MOST_POINTS)
    classes: dict[int, list[float]] = {}
    for d in differences:
        classes.setdefault(d.position // width, []).append(abs(d.difference))
    return tuple(
        CurvePoint(place * width, min((place + 1) * width, places) - 1, mean(gaps), len(gaps))
        for place, gaps in sorted(classes.items())
    )


def by_probability(differences: Sequence[TokenDifference]) -> tuple[CurvePoint, ...]:
    """Mean |difference| by the engine's probability of a token.

    Rounding moves unlikely tokens more; another temperature leaves the sure ones alone.
    """
    classes: dict[int, list[float]] = {}
    for d in differences:
        if math.isnan(d.rollout_log_prob):
            continue
        probability = math.exp(min(d.rollout_log_prob, 0.0))
        last = len(PROBABILITIES) - 2
        place = next((i for i in range(last) if probability < PROBABILITIES[i + 1]), last)
        classes.setdefault(place, []).append(abs(d.difference))
    return tuple(
        CurvePoint(PROBABILITIES[i], PROBABILITIES[i + 1], mean(gaps), len(gaps))
        for i, gaps in sorted(classes.items())
    )


def k1(differences: Sequence[float]) -> float:
    """KL(rollout || trainer), nats a token: unbiased, noisy, at times below 0."""
    return _kl(differences, "k1") if all(map(math.isfinite, differences)) else math.nan


def k3(differences: Sequence[float]) -> float:
    """KL(rollout || trainer), nats a token, with less noise than `k1` and never below 0."""
    return _kl([min(d, LARGEST_LOG_RATIO) for d in differences], "k3")


def _kl(differences: Sequence[float], kind: Literal["k1", "k3"]) -> float:
    """KL of a token from trainer minus rollout, with the rollout's log-prob as 0."""
    import torch

    from kit.algo.kl import approx_kl

    trainer_T = torch.tensor(differences, dtype=torch.float64)
    return mean(approx_kl(torch.zeros_like(trainer_T), trainer_T, kind).tolist())


def effective_sample_size(differences: Sequence[float]) -> float:
    """Effective sample size after reweighting by these log-ratios, as a share."""
    import torch

    from kit.algo import corrections

    ratio_T = torch.tensor(differences, dtype=torch.float64)
    return corrections.effective_sample_size(ratio_T, torch.ones(len(differences)))
