"""From a check that did not pass to its cause: which probes run, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from kit.config import SessionConfig
from kit.mismatch import probes
from kit.mismatch.compare import compare, unaligned
from kit.mismatch.lab import Finding, Lab, suspects
from kit.reports import Cause, MismatchReport
from kit.samples import Sample

if TYPE_CHECKING:
    from kit.prompting import Prompting
    from kit.stack.stack import Stack

PROBES = (
    probes.weights,
    probes.tokens,
    probes.repetition,
    probes.prefix_cache,
    probes.sampling,
    probes.packing,
    probes.routing,
    probes.precision,
)
"""The first that explains the difference ends the search. Cheap ones, and those whose fault would
spoil the others' results, come first; precision is last, because a little of it is always there."""

LURKING: tuple[Cause, ...] = ("stale_weights", "stale_prefix_cache", "dropout")
"""Causes that can be there while these log-probs agree. The others are differences explained, and
where there is none there is nothing to explain."""


def check(
    samples: Sequence[Sample],
    *,
    config: SessionConfig,
    stack: Stack,
    prompting: Prompting,
    trainer_version: int,
    engine_version: int,
    deep: bool = False,
) -> MismatchReport:
    """Compare a rollout's log-probs with the trainer's, and look for the cause of a difference.

    Args:
        samples: with `rollout_log_probs`.
        config: the session's.
        stack: engine and trainer.
        prompting: tokenizer and prompts.
        trainer_version: weight version the trainer holds now.
        engine_version: weight version the engine holds now.
        deep: run all probes, whatever the verdict.
    """
    lengths = [s.response_length for s in samples]
    trained = stack.by_token([s.tokens for s in samples], lengths, "policy")
    report = compare(
        samples,
        trained,
        config=config.mismatch,
        dtype=stack.dtype,
        trainer_version=trainer_version,
        token_text=prompting.token_text,
    )
    if report.verdict == "pass" and not deep:
        return report
    chosen = suspects(samples, trained)
    lab = Lab(
        config,
        stack,
        prompting,
        report,
        engine_version,
        [samples[i] for i in chosen],
        [trained[i] for i in chosen],
    )
    return explain(lab, deep=deep)


def explain(lab: Lab, *, deep: bool) -> MismatchReport:
    """The report with the cause that the probes found, and what they saw on the way."""
    report = lab.report
    evidence = [f"{len(lab.samples)} samples that differ most were computed again"]
    cause: Finding | None = None
    for probe in (*PROBES, probes.training_mode) if deep else PROBES:
        finding = probe(lab)
        evidence += finding.evidence
        if finding.kind and not cause and (report.verdict != "pass" or finding.kind in LURKING):
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
