"""The log-prob check: compares both sides by token, and runs the probes that find the cause."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kit.config import MismatchConfig, SessionConfig
from kit.diagnostics.mismatch import curves, probes
from kit.diagnostics.mismatch.experiments import (
    MAX_SAMPLES,
    Experiments,
    Finding,
    worst_samples,
)
from kit.errors import DataError
from kit.reports import Cause, MismatchReport, TokenDifference, Verdict
from kit.rollout.batch import replayed
from kit.samples import Rollout, Sample
from kit.samples.token_values import ratio

if TYPE_CHECKING:
    from kit.rollout.sampler import PromptSampler
    from kit.stack.stack import Stack


PROBES = (
    probes.weights,
    probes.tokens,
    probes.operators,
    probes.repetition,
    probes.prefix_cache,
    probes.sampling,
    probes.packing,
    probes.routing,
    probes.precision,
)
"""The first that explains the difference ends the search. Cheap ones, and those whose fault would
spoil the others' results, come first; precision is last, because a little of it is always there."""

LATENT_CAUSES: tuple[Cause, ...] = ("stale_weights", "adapter", "stale_prefix_cache", "dropout")
"""Causes that can be there while these log-probs agree. The others are differences explained, and
where there is none there is nothing to explain."""


def check(
    rollout: Rollout,
    *,
    config: SessionConfig,
    stack: Stack,
    sampler: PromptSampler,
    deep: bool = False,
) -> MismatchReport:
    """Compare a rollout's log-probs with the trainer's, and look for the cause of a difference.

    Args:
        rollout: samples without log-probs are left out.
        config: the session's.
        stack: engine and trainer.
        sampler: tokenizer and prompts.
        deep: run all probes, whatever the verdict.

    Raises:
        DataError: no sample has log-probs.
    """
    if not (samples := comparable(rollout)):
        raise DataError("The rollout has no tokens with log-probs to compare.")
    lengths, exact = [s.response_length for s in samples], config.training.true_on_policy
    experts = replayed(samples, config.training)
    trained = stack.by_token([s.tokens for s in samples], lengths, "policy", experts)

    def judged(rounding: float = 0.0) -> MismatchReport:
        return compare(
            samples,
            trained,
            config=config.mismatch,
            dtype=stack.dtype,
            rounding=rounding,
            rounds_activations=rounds_activations(config),
            exact=exact,
            trainer_version=stack.trainers.version,
            token_text=sampler.token_text,
        )

    def experiments(chosen: Sequence[int]) -> Experiments:
        return Experiments(
            config,
            stack,
            sampler,
            report,
            stack.weights.engine_version,
            [samples[i] for i in chosen],
            [trained[i] for i in chosen],
        )

    report = judged()
    rounds = stack.dtype == "bfloat16" and not exact
    if report.verdict != "pass" and rounds and not config.mismatch.warn_above:
        any_samples = range(0, len(samples), math.ceil(len(samples) / MAX_SAMPLES))
        report = judged(experiments(any_samples).rounding)
    if report.verdict == "pass" and not deep:
        return report
    return explain(experiments(worst_samples(samples, trained)), deep=deep)


def explain(lab: Experiments, *, deep: bool) -> MismatchReport:
    """Add the cause that the probes found to a report, with their evidence."""
    report = lab.report
    evidence = [f"{len(lab.samples)} samples that differ most were computed again"]
    cause: Finding | None = None
    for probe in (*PROBES, probes.training_mode) if deep else PROBES:
        finding = probe(lab)
        evidence += finding.evidence
        if (
            finding.kind
            and not cause
            and (report.verdict != "pass" or finding.kind in LATENT_CAUSES)
        ):
            cause = finding
            if not deep:
                break
    if cause is None:
        if report.verdict == "pass":
            return replace(report, evidence=tuple(evidence))
        words = (
            "No probe made the difference go away; the evidence says what it is not. Look at the "
            "tokens that differ most, and at settings that only one side has (engine.extra)."
        )
        return replace(report, cause=words, cause_kind="unknown", evidence=tuple(evidence))
    verdict = report.verdict
    if verdict == "pass":
        # These log-probs agree. What else was found will matter: in the update, or next time.
        verdict = "warn"
    elif unaligned(lab.samples):
        verdict = "fail"
    return replace(
        report,
        verdict=verdict,
        cause=cause.words,
        cause_kind=cause.kind or "unknown",
        evidence=tuple(evidence),
    )


THRESHOLDS = {"float32": (1e-5, 1e-3), "fp8": (2e-3, 0.02), "bfloat16": (0.02, 0.1)}
"""Mean |trainer - rollout| log-prob above which to warn and to fail, by dtype. `fp8` is float32
where both sides round activations to FP8: a last bit that differs moves one of them by a step.
"""
WORST = 8
CONTEXT = 6
"""Tokens shown on either side of one of the worst."""


def comparable(rollout: Rollout) -> list[Sample]:
    """Samples with tokens and log-probs to compare."""
    return [s for s in rollout if s.response_length and s.rollout_log_probs]


def still_fits(last: Rollout | None, engine_version: int) -> Rollout | None:
    """The last rollout, if the engine's present weights wrote it and it can be compared."""
    if last is None or not last.written_by({engine_version}) or not comparable(last):
        return None
    return last


def compare(
    samples: Sequence[Sample],
    train_log_probs: Sequence[Sequence[float]],
    *,
    config: MismatchConfig,
    dtype: str,
    rounding: float = 0.0,
    rounds_activations: bool = False,
    exact: bool = False,
    trainer_version: int,
    token_text: Callable[[int], str],
) -> MismatchReport:
    """Compare both sides' log-probs, token by token. The cause is left open, save for old weights.

    A sample with another number of log-probs than of tokens is compared as far as both go, and
    fails the check.

    Args:
        samples: with `rollout_log_probs`.
        train_log_probs: the trainer's, by sample and response token.
        config: thresholds, where set.
        dtype: of the computation; gives the thresholds that are not set.
        rounding: what rounding to it does to log-probs of these samples, where that is known.
        rounds_activations: both sides round activations to FP8.
        exact: both sides compute with the same operators, so that nothing may differ.
        trainer_version: weight version the trainer holds now.
        token_text: a token id as text, for the list of the worst tokens.
    """
    by_token = _token_differences(samples, train_log_probs)
    differences = [d for _, d in by_token]
    signed = [d.difference for d in differences]
    gaps = [abs(x) for x in signed]
    mean, ratios = curves.mean(gaps), [ratio(x) for x in signed]
    largest = max(gaps, key=curves.badness, default=0.0)
    coarsest = "fp8" if rounds_activations and dtype == "float32" else dtype
    warn, fail = (0.0, 0.0) if exact else thresholds(config, coarsest, rounding)
    versions = tuple(sorted({v for sample in samples for v in sample.weight_versions}))
    stale = any(version != trainer_version for version in versions)
    verdict = "fail" if unaligned(samples) else _verdict(mean, warn, fail, stale)
    worst = _worst(samples, [(n, d) for n, d in by_token if d.difference != 0 or not exact])
    return MismatchReport(
        verdict=verdict,
        cause=_cause(verdict, versions, trainer_version, "" if exact else dtype, largest),
        mean_abs_diff=mean,
        max_abs_diff=largest,
        kl_k1=curves.k1(signed),
        kl_k3=curves.k3(signed),
        tokens=len(differences),
        warn_above=warn,
        fail_above=fail,
        worst=tuple(_in_context(samples[number], d, token_text) for number, d in worst),
        trainer_version=trainer_version,
        rollout_versions=versions,
        cause_kind="none" if verdict == "pass" else "stale_weights" if stale else "unknown",
        quantiles=curves.quantiles(gaps),
        ratio_range=(min(ratios), max(ratios)) if ratios else (1.0, 1.0),
        effective_sample_size=curves.effective_sample_size(signed),
        by_position=curves.by_position(differences),
        by_probability=curves.by_probability(differences),
    )


def rounds_activations(config: SessionConfig) -> bool:
    """Whether trainer and engine both round activations to FP8."""
    quantized = config.model.quantization
    return quantized is not None and quantized.method == "fp8"


def _token_differences(
    samples: Sequence[Sample], train_log_probs: Sequence[Sequence[float]]
) -> list[tuple[int, TokenDifference]]:
    """Differences by token: (sample's number, both sides' log-probs)."""
    return [
        (number, TokenDifference(sample.index, place, "", rollout, train))
        for number, (sample, train_row) in enumerate(zip(samples, train_log_probs, strict=True))
        for place, (rollout, train, active) in enumerate(
            zip(sample.rollout_log_probs or [], train_row, sample.mask, strict=False)
        )
        if active
    ]


def thresholds(config: MismatchConfig, dtype: str, rounding: float = 0.0) -> tuple[float, float]:
    """Mean |difference| above which to warn, and to fail.

    Both sides round, each in its own way, so twice the rounding of one is no mismatch.
    """
    warn_default, fail_default = THRESHOLDS[dtype]
    warn_default = max(warn_default, 2 * rounding)
    # A default gives way to a threshold that is set on its other side.
    warn = config.warn_above or min(warn_default, config.fail_above or math.inf)
    return warn, config.fail_above or max(fail_default, warn)


def unaligned(samples: Sequence[Sample]) -> list[Sample]:
    """Samples whose number of log-probs differs from that of response tokens."""
    return [s for s in samples if len(s.rollout_log_probs or []) != s.response_length]


def _worst(
    samples: Sequence[Sample], by_token: Sequence[tuple[int, TokenDifference]]
) -> list[tuple[int, TokenDifference]]:
    """Tokens with the largest differences; a prefix that samples share counts once."""
    worst: dict[tuple[int, ...], tuple[int, TokenDifference]] = {}
    for number, difference in sorted(
        by_token, key=lambda item: -curves.badness(item[1].difference)
    ):
        sample = samples[number]
        place = len(sample.tokens) - sample.response_length + difference.position
        worst.setdefault(tuple(sample.tokens[: place + 1]), (number, difference))
        if len(worst) == WORST:
            break
    return list(worst.values())


def _in_context(
    sample: Sample, difference: TokenDifference, token_text: Callable[[int], str]
) -> TokenDifference:
    place = len(sample.tokens) - sample.response_length + difference.position
    before = sample.tokens[max(place - CONTEXT, 0) : place]
    after = sample.tokens[place + 1 : place + 1 + CONTEXT]
    return replace(
        difference,
        token=token_text(sample.tokens[place]),
        before="".join(map(token_text, before)),
        after="".join(map(token_text, after)),
    )


def _verdict(mean: float, warn: float, fail: float, stale: bool) -> Verdict:
    if not mean <= warn:  # NaN is no agreement either
        return "fail" if stale or not mean <= fail else "warn"
    return "warn" if stale else "pass"  # small steps in bfloat16 hide in its rounding


def _cause(
    verdict: Verdict, versions: Sequence[int], trainer: int, dtype: str, largest: float
) -> str:
    """What can be said without a probe; `dtype` is empty where nothing may differ."""
    if verdict == "pass":
        return "Trainer and engine agree" + ("." if largest else " to the bit.")
    old = ", ".join(map(str, versions))
    if any(version != trainer for version in versions):
        return (
            f"Stale weights: the rollout was written by weights version {old}, the trainer now "
            f"holds version {trainer}. Call session.sync() if you have not since the last update, "
            f"and generate again; train only on what the present weights wrote."
        )
    if not dtype:
        return (
            f"training.true_on_policy promises equal bits, and the largest difference is "
            f"{largest:.2g}: some operator computed otherwise on one side."
        )
    return (
        f"Both sides hold weights version {trainer}, so the weights are not stale. What is left is "
        f"arithmetic ({dtype}) or a setting that only one side has, such as engine.extra."
    )
