"""Do trainer and engine agree on the log-probabilities of a rollout?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kit.config import MismatchConfig
from kit.reports import MismatchReport, TokenDifference, Verdict
from kit.samples import Sample

THRESHOLDS = {"float32": (1e-5, 1e-3), "bfloat16": (0.02, 0.1)}
"""Mean |trainer - rollout| log-prob above which to warn and to fail, by dtype."""
WORST = 8


def compare(
    samples: Sequence[Sample],
    train_log_probs: Sequence[Sequence[float]],
    *,
    config: MismatchConfig,
    dtype: str,
    trainer_version: int,
    token_text: Callable[[int], str],
) -> MismatchReport:
    """Compare both sides' log-probs, token by token.

    Args:
        samples: with `rollout_log_probs`.
        train_log_probs: the trainer's, by sample and response token.
        config: thresholds, where set.
        dtype: of the computation; gives the thresholds that are not set.
        trainer_version: weight version the trainer holds now.
        token_text: a token id as text, for the list of the worst tokens.
    """
    differences = [
        TokenDifference(sample.index, place, token_text(token), rollout, train)
        for sample, train_row in zip(samples, train_log_probs, strict=True)
        for place, (token, rollout, train, active) in enumerate(
            zip(
                sample.response_tokens,
                sample.rollout_log_probs or [],
                train_row,
                sample.mask,
                strict=True,
            )
        )
        if active
    ]
    gaps = [abs(d.difference) for d in differences]
    mean = math.fsum(gaps) / len(gaps) if gaps else 0.0
    warn_default, fail_default = THRESHOLDS[dtype]
    # A default gives way to a threshold that is set on its other side.
    warn = config.warn_above or min(warn_default, config.fail_above or math.inf)
    fail = config.fail_above or max(fail_default, warn)
    versions = tuple(sorted({v for sample in samples for v in sample.weight_versions}))
    stale = any(version != trainer_version for version in versions)
    verdict = _verdict(mean, warn, fail, stale)
    return MismatchReport(
        verdict=verdict,
        cause=_cause(verdict, versions, trainer_version, dtype),
        mean_abs_diff=mean,
        max_abs_diff=max(gaps, key=_badness, default=0.0),
        kl=_k3(differences),
        tokens=len(differences),
        warn_above=warn,
        fail_above=fail,
        worst=tuple(sorted(differences, key=lambda d: -_badness(d.difference))[:WORST]),
        trainer_version=trainer_version,
        rollout_versions=versions,
    )


def _badness(difference: float) -> float:
    """Orders differences; NaN, which compares with nothing, is as bad as can be."""
    return math.inf if math.isnan(difference) else abs(difference)


def _k3(differences: Sequence[TokenDifference]) -> float:
    """KL(rollout || trainer) per token, from the rollout's own tokens."""
    clamped = [min(d.difference, 20.0) for d in differences]
    terms = [math.expm1(x) - x for x in clamped]
    return math.fsum(terms) / len(terms) if terms else 0.0


def _verdict(mean: float, warn: float, fail: float, stale: bool) -> Verdict:
    if not mean <= warn:  # NaN is no agreement either
        return "fail" if stale or not mean <= fail else "warn"
    return "warn" if stale else "pass"  # small steps in bfloat16 hide in its rounding


def _cause(verdict: Verdict, versions: Sequence[int], trainer: int, dtype: str) -> str:
    if verdict == "pass":
        return "Trainer and engine agree."
    old = ", ".join(map(str, versions))
    if any(version != trainer for version in versions):
        return (
            f"Stale weights: the rollout was written by weights version {old}, the trainer now "
            f"holds version {trainer}. Call session.sync() if you have not since the last update, "
            f"and generate again; train only on what the present weights wrote."
        )
    return (
        f"Both sides hold weights version {trainer}, so the weights are not stale. What is left is "
        f"arithmetic ({dtype}) or a setting that only one side has, such as engine.extra."
    )
