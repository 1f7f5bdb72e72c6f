"""`StepReport` and `TrainReport`: one whole step, and the run that steps make."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.reports import StepReport, TrainReport
from kit.tracking.catalog import concerns, short_name
from kit.tracking.trends import trends
from kit.utils.formatting import columns, count, duration, mean, named, number, percent, shorten
from kit.viz.curves import curve, evaluations_of, rows_of, run_curves
from kit.viz.html import Column, badge, facts, fold, join, note, numeric, spaced, table, tag, title
from kit.viz.plots import CURVES, curves_svg
from kit.viz.render import register
from kit.viz.reports.evaluation import eval_html, eval_number, sets_headline
from kit.viz.reports.mismatch import mismatch_html, verdict_badge, verdict_words
from kit.viz.reports.update import concern_list, sync_line, update_concerns, update_html
from kit.viz.samples.rollout import rollout_groups, rollout_summary
from kit.viz.theme import PHASES

HEADLINES = (
    "rollout/raw_reward",
    "rollout/response_len/mean",
    "rollout/truncated_ratio",
    "train/pg_loss",
    "train/grad_norm",
    "train/pg_clipfrac",
    "train/update_kl",
)
MORE = ("train/entropy_loss", "train/train_rollout_logprob_abs_diff", "perf/step_time")
"""Of a run, also these."""


def _step_facts(report: StepReport) -> list[tuple[str, str]]:
    """The headline numbers of a step, as (name, value)."""
    logged = [name for name in HEADLINES if name in report.metrics]
    rows = [(short_name(name), number(report.metrics[name], 3)) for name in logged]
    for name, one in report.evaluation.sets.items() if report.evaluation else ():
        rows.append((f"{shorten(name, 40)} (evaluation)", eval_number(one)))
    return rows


def phases(report: StepReport) -> list[tuple[str, float]]:
    """Seconds of each part of a step, and of whatever is left of the whole."""
    metrics = report.metrics
    parts = [
        ("generate", metrics.get("perf/rollout_time", report.rollout.seconds)),
        ("train", metrics.get("perf/actor_train_time", report.update.seconds)),
        ("hand over weights", metrics.get("perf/update_weights_time", report.sync.seconds)),
    ]
    parts = [(words, s if math.isfinite(s) else 0.0) for words, s in parts]
    rest = metrics.get("perf/step_time", 0.0) - sum(seconds for _, seconds in parts)
    return [*parts, ("everything else", rest)] if rest > 0 else parts


def step_concerns(report: StepReport) -> dict[str, str]:
    """Every metric of the step that deserves a second look, and why."""
    return concerns(report.metrics) | update_concerns(report.update) | dict(report.trends)


def _step_html(report: StepReport) -> Markup:
    """Headline numbers, where the time went, what to look at; the verbs' results folded."""
    rollout, mismatch, evaluation = report.rollout, report.mismatch, report.evaluation
    return join(
        title(f"Step {report.step}"),
        facts(_step_facts(report)),
        tag("div", "trainer against engine ", verdict_badge(mismatch)) if mismatch else None,
        concern_list(step_concerns(report)),
        phase_bar(phases(report)),
        note(sync_line(report.sync)),
        fold("The update", update_html(report.update)),
        fold("The rollout", rollout_summary(rollout), rollout_groups(rollout, open_groups=2)),
        fold("Trainer against engine", mismatch_html(mismatch)) if mismatch else None,
        fold("The evaluation", eval_html(evaluation)) if evaluation else None,
    )


def phase_bar(parts: Sequence[tuple[str, float]]) -> Markup | None:
    """The parts of a step as one bar, and each in words under it."""
    whole = sum(seconds for _, seconds in parts)
    if whole <= 0:
        return None
    coloured = list(zip(parts, PHASES, strict=False))
    fills = (
        tag("i", style=f"width:{100 * seconds / whole:.4g}%;background:{colour}")
        for (_, seconds), colour in coloured
        if seconds > 0
    )
    words = (
        tag(
            "span",
            tag("span", class_="kv-dot", style=f"background:{colour}"),
            f"{name} {duration(seconds)} ({percent(seconds / whole)})",
        )
        for (name, seconds), colour in coloured
    )
    stack = tag("div", *fills, class_="kv-stack", aria_hidden="true")
    return join(stack, tag("div", spaced(words), class_="kv-legend"))


def _step_plain(report: StepReport) -> str:
    lines = [f"Step {report.step}"]
    if rows := _step_facts(report):
        lines.append(named(rows))
    lines.append(named((name, duration(s)) for name, s in phases(report)))
    if report.mismatch:
        lines.append(f"  trainer against engine: {verdict_words(report.mismatch)[0]}")
    lines += [f"  ! {shorten(name, 60)}: {why}" for name, why in step_concerns(report).items()]
    return "\n".join(lines)


register(StepReport, _step_html, _step_plain)


def _train_title(report: TrainReport) -> str:
    if not report.steps:
        return "Training run, no steps yet"
    first, last = report.steps[0].step, report.steps[-1].step
    took = f" in {duration(report.seconds)}" if report.seconds > 0 else ""
    return f"Training run: {count(len(report), 'step')} ({first} to {last}){took}"


def _first_and_last(report: TrainReport) -> tuple[list[str], list[list[str]]]:
    """Heads and rows: each evaluation, then each metric, as a mean over a tenth of the run."""
    rows = rows_of(report)
    span = max(len(rows) // 10, 1)
    evaluations = evaluations_of(report).items()
    ends = [(name, points[0][1], points[-1][1]) for name, points in evaluations if points]
    for name in (*HEADLINES, *MORE):
        if values := [value for _, value in curve(rows, name).points]:
            ends.append((name, mean(values[:span]), mean(values[-span:])))
    steps = "step" if span == 1 else f"{span} steps"
    return [f"first {steps}", f"last {steps}", "change"], [
        [name, number(first), number(last), f"{last - first:+.3g}"] for name, first, last in ends
    ]


def _train_html(report: TrainReport) -> Markup:
    """Curves, a table of first against last, the last evaluation, why it stopped early."""
    drawn = run_curves(rows_of(report), CURVES, evaluations_of(report))
    ends, lines = _first_and_last(report)
    stopped = f"! stopped early: {shorten(report.stopped, 500)}" if report.stopped else None
    last = report.evaluations[-1:]
    spoiled = {
        c.name: f"{count(c.dropped, 'step')} without a finite value" for c in drawn if c.dropped
    }
    return join(
        title(_train_title(report)),
        tag("div", badge(stopped, "warn")) if stopped else None,
        concern_list(spoiled | run_concerns(report)),
        curves_svg(drawn),
        table([Column("metric", "name"), *numeric(*ends)], lines) if lines else None,
        *(fold(f"Last evaluation: {sets_headline(e)}", eval_html(e)) for e in last),
    )


def run_concerns(report: TrainReport) -> dict[str, str]:
    """What deserves a second look: the course of a run, and what was off in its steps."""
    seen: dict[str, list[str]] = {}
    for step in report.steps:
        for name, why in (concerns(step.metrics) | update_concerns(step.update)).items():
            seen.setdefault(name, []).append(why)
    steps = count(len(report), "step")
    off = {name: f"in {len(whys)} of {steps}: {whys[-1]}" for name, whys in seen.items()}
    return off | trends(rows_of(report))


def _train_plain(report: TrainReport) -> str:
    ends, lines = _first_and_last(report)
    words = [_train_title(report)]
    if report.stopped:
        words.append(f"  ! stopped early: {shorten(report.stopped, 300)}")
    words += [f"  ! {shorten(name, 60)}: {why}" for name, why in run_concerns(report).items()]
    if lines:
        words.append(columns([["", *ends], *([shorten(r[0], 50), *r[1:]] for r in lines)]))
    return "\n".join(words)


register(TrainReport, _train_html, _train_plain)
