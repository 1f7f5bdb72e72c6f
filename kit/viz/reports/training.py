"""`StepReport` and `TrainReport`: one whole step, and the run that steps make."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.reports import StepReport, TrainReport
from kit.tracking.catalog import concerns, short_name
from kit.utils.display import Bundle
from kit.utils.formatting import columns, count, duration, mean, number, percent, shorten
from kit.viz.curves import Row, curve, evaluations_of, rows_of, run_curves
from kit.viz.html import Column, facts, fold, in_page, join, note, spaced, table, tag, title
from kit.viz.plots import CURVES, curves_svg
from kit.viz.render import render
from kit.viz.reports.evaluation import eval_headline, eval_html
from kit.viz.reports.mismatch import VERDICTS, mismatch_html, verdict_badge
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
)
SUMMARY = (
    *HEADLINES,
    "train/entropy_loss",
    "train/train_rollout_logprob_abs_diff",
    "perf/step_time",
)


@render.register(StepReport)
def show_step(report: StepReport) -> Bundle:
    """HTML and plain text of one step."""
    return in_page(step_html(report), step_plain(report))


def step_facts(report: StepReport) -> list[tuple[str, str]]:
    """The headline numbers of a step, as (name, value)."""
    rows = [
        (short_name(name), number(report.metrics[name], 3))
        for name in HEADLINES
        if name in report.metrics
    ]
    if report.evaluation:
        words = f"{shorten(report.evaluation.dataset, 40)} (evaluation)"
        rows.append((words, percent(report.evaluation.accuracy)))
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
    return concerns(report.metrics) | update_concerns(report.update)


def step_html(report: StepReport) -> Markup:
    """Headline numbers, where the time went, what to look at; the verbs' results folded."""
    verdict = verdict_badge(report.mismatch) if report.mismatch else None
    agree = tag("div", "trainer against engine ", verdict) if verdict else None
    parts = [
        fold("The update", update_html(report.update)),
        fold(
            "The rollout",
            rollout_summary(report.rollout),
            rollout_groups(report.rollout, open_groups=2),
        ),
    ]
    if report.mismatch:
        parts.append(fold("Trainer against engine", mismatch_html(report.mismatch)))
    if report.evaluation:
        parts.append(fold("The evaluation", eval_html(report.evaluation)))
    return join(
        (
            title(f"Step {report.step}"),
            facts(step_facts(report)),
            agree,
            concern_list(step_concerns(report)),
            phase_bar(phases(report)),
            note(sync_line(report.sync)),
            *parts,
        )
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
    return join((stack, tag("div", spaced(words), class_="kv-legend")))


def step_plain(report: StepReport) -> str:
    """The display in plain text, for a terminal."""
    lines = [f"Step {report.step}"]
    if rows := step_facts(report):
        lines.append("  " + "   ".join(f"{name} {value}" for name, value in rows))
    times = "   ".join(f"{name} {duration(seconds)}" for name, seconds in phases(report))
    lines.append(f"  {times}")
    if report.mismatch:
        lines.append(f"  trainer against engine: {VERDICTS[report.mismatch.verdict][0]}")
    lines += [f"  ! {shorten(name, 60)}: {why}" for name, why in step_concerns(report).items()]
    return "\n".join(lines)


@render.register(TrainReport)
def show_training_run(report: TrainReport) -> Bundle:
    """HTML and plain text of a training run."""
    return in_page(train_html(report), train_plain(report))


def _train_title(report: TrainReport) -> str:
    if not report.steps:
        return "Training run, no steps yet"
    first, last = report.steps[0].step, report.steps[-1].step
    took = f" in {duration(report.seconds)}" if report.seconds > 0 else ""
    return f"Training run: {count(len(report), 'step')} ({first} to {last}){took}"


def _summary(rows: Sequence[Row], names: Sequence[str]) -> tuple[int, list[list[str]]]:
    """First against last, each a mean over a tenth of the run: how many steps that is, and rows."""
    span = max(len(rows) // 10, 1)
    lines = []
    for name in names:
        values = [value for _, value in curve(rows, name).points]
        if values:
            first, last = mean(values[:span]), mean(values[-span:])
            lines.append([name, number(first), number(last), f"{last - first:+.3g}"])
    return span, lines


def _ends(span: int) -> tuple[str, str]:
    steps = "step" if span == 1 else f"{span} steps"
    return f"first {steps}", f"last {steps}"


def _evaluation_rows(report: TrainReport) -> list[list[str]]:
    return [
        [name, number(points[0][1]), number(points[-1][1]), f"{points[-1][1] - points[0][1]:+.3g}"]
        for name, points in evaluations_of(report).items()
        if points
    ]


def train_html(report: TrainReport) -> Markup:
    """Curves, a table of first against last, the last evaluation, why it stopped early."""
    rows = rows_of(report)
    drawn = run_curves(rows, CURVES, evaluations_of(report))
    span, lines = _summary(rows, SUMMARY)
    lines = _evaluation_rows(report) + lines
    ends = _ends(span)
    heads = [Column("metric"), *(Column(end, "num") for end in ends), Column("change", "num")]
    stopped = f"! stopped early: {shorten(report.stopped, 500)}" if report.stopped else None
    spoiled = {
        c.name: f"{count(c.dropped, 'step')} without a finite value" for c in drawn if c.dropped
    }
    return join(
        (
            title(_train_title(report)),
            tag("div", tag("span", stopped, class_="kv-badge kv-warn")) if stopped else None,
            concern_list(spoiled),
            curves_svg(drawn),
            table(heads, lines) if lines else None,
            _last_evaluation(report),
        )
    )


def _last_evaluation(report: TrainReport) -> Markup | None:
    if not report.evaluations:
        return None
    last = report.evaluations[-1]
    return fold(f"Last evaluation: {eval_headline(last)}", eval_html(last))


def train_plain(report: TrainReport) -> str:
    """The display in plain text, for a terminal."""
    rows = rows_of(report)
    span, lines = _summary(rows, SUMMARY)
    lines = _evaluation_rows(report) + lines
    words = [_train_title(report)]
    if report.stopped:
        words.append(f"  ! stopped early: {shorten(report.stopped, 300)}")
    if lines:
        ends = _ends(span)
        table_rows = [["", *ends, "change"], *([shorten(r[0], 50), *r[1:]] for r in lines)]
        words.append(columns(table_rows))
    return "\n".join(words)
