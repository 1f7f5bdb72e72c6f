"""`UpdateReport` and `SyncReport`: what one update did, and the weight sync after it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

from kit.reports import Metrics, SyncReport, UpdateReport
from kit.tracking.catalog import concerns, meaning, short_name, what_is_off
from kit.utils.formatting import columns, count, data_size, duration, named, number, shorten
from kit.viz.html import Column, badge, facts, fold, join, note, numeric, quiet, table, tag, title
from kit.viz.render import register
from kit.viz.samples.batch import left_out
from kit.viz.svg import bars, side_by_side

MOST_METRICS = 80
MOST_STEPS = 64
DRAWN = ("train/loss", "train/ppo_kl", "train/pg_clipfrac", "train/grad_norm")
"""What is drawn of an update with several optimizer steps."""


def _title(report: UpdateReport) -> str:
    """`Update of step 3: 128 samples`, and whether it was a repeated call."""
    words = f"Update of step {report.step}: {count(report.samples, 'sample')}"
    if not report.samples:
        return f"{words}: nothing to train on, the weights are unchanged"
    return words if report.applied else f"{words}, applied before; nothing was done again"


def update_html(report: UpdateReport) -> Markup:
    """Title, headline numbers, the table of metrics, and the optimizer steps one by one."""
    return join(
        title(_title(report)),
        facts(_facts(report)),
        concern_list(update_concerns(report)),
        _metric_table(report.metrics, update_concerns(report)),
        _curves(report.per_step),
        _steps(report.per_step) if len(report.per_step) > 1 else None,
        left_out(report.left_out),
    )


def _plain(report: UpdateReport) -> str:
    off = update_concerns(report)
    lines = [_title(report), named(_facts(report))]
    rows = [
        [mark(name, off), shorten(name, 60), number(value), meaning(name).expect]
        for name, value in list(report.metrics.items())[:MOST_METRICS]
    ]
    lines.append(columns(rows))
    lines += [f"  ! {shorten(name, 60)}: {why}" for name, why in off.items()]
    lines += [f"  left out: {shorten(reason, 100)}" for reason in report.left_out[:5]]
    return "\n".join(line for line in lines if line)


register(UpdateReport, update_html, _plain)


def update_concerns(report: UpdateReport) -> dict[str, str]:
    """What deserves a second look in an update: its means, and its first optimizer step's KL."""
    off = concerns(report.metrics)
    first = report.per_step[0].get("train/ppo_kl") if report.per_step else None
    if "train/ppo_kl" not in off and first is not None and abs(first) > 0.01:
        off["train/ppo_kl"] = (
            f"{number(first)} at the first optimizer step, where the policy has not moved yet"
        )
    return off


def _facts(report: UpdateReport) -> list[tuple[str, str]]:
    rate = report.tokens / report.seconds if report.seconds > 0 else math.nan
    return [
        ("optimizer steps", f"{len(report.per_step):,}"),
        ("tokens", f"{report.tokens:,}"),
        ("took", duration(report.seconds)),
        ("speed", "–" if math.isnan(rate) else f"{rate:,.0f} tokens/s"),
        ("left out", count(len(report.left_out), "group")),
    ]


def mark(name: str, off: Mapping[str, str]) -> str:
    """`✓`, or `!` where a metric deserves a second look."""
    return "!" if name in off else "✓"


def concern_list(off: Mapping[str, str]) -> Markup | None:
    """One line for each metric that deserves a second look; None where all look right."""
    if not off:
        return None
    items = [
        tag("li", tag("b", shorten(name, 60)), f": {why}") for name, why in list(off.items())[:20]
    ]
    words = f"! {count(len(off), 'metric')} to look at"
    return tag("div", badge(words, "warn"), tag("ul", *items))


def _metric_table(metrics: Metrics, off: Mapping[str, str]) -> Markup:
    """All metrics: the value, a mark, what it measures and what it should be."""
    heads = [Column("", "fit"), Column("metric", "name"), Column("value", "num")]
    heads += [Column("what it is", "hint"), Column("what it should be", "hint")]
    rows = [
        [
            mark(name, off),
            tag("span", shorten(name, 60), class_="kv-text"),
            number(value),
            meaning(name).words,
            quiet(meaning(name).expect),
        ]
        for name, value in list(metrics.items())[:MOST_METRICS]
    ]
    more = len(metrics) - len(rows)
    return join(table(heads, rows), note(count(more, "more metric")) if more > 0 else None)


def _curves(per_step: Sequence[Metrics]) -> Markup | None:
    """How the update went from its first optimizer step to its last; None where it made one."""
    if len(per_step) < 2:
        return None
    shown = per_step[:MOST_STEPS]
    return side_by_side(
        [
            bars(
                [(f"step {i}", step.get(name, math.nan)) for i, step in enumerate(shown, start=1)],
                f"{short_name(name)}, by optimizer step",
            )
            for name in DRAWN
            if any(name in step for step in shown)
        ]
    )


def _steps(per_step: Sequence[Metrics]) -> Markup:
    """One row an optimizer step, one column a metric."""
    names = list(dict.fromkeys(name for step in per_step for name in step))[:12]
    heads = numeric("step", *(shorten(name.removeprefix("train/"), 40) for name in names))

    def cell(step: Metrics, name: str) -> str:
        off = what_is_off(name, step.get(name))
        return number(step.get(name), 3) + (" !" if off else "")

    rows = [
        [str(index), *(cell(step, name) for name in names)]
        for index, step in enumerate(per_step[:MOST_STEPS], start=1)
    ]
    more = len(per_step) - len(rows)
    return fold(
        f"{count(len(per_step), 'optimizer step')} one by one",
        table(heads, rows),
        note(count(more, "more step")) if more else None,
    )


def sync_line(report: SyncReport) -> str:
    """`Weights version 4 handed to the engine: 310 tensors, 1.2 GB in 55 ms (21.7 GB/s)`."""
    rate = f" ({data_size(report.bytes / report.seconds)}/s)" if report.seconds > 0 else ""
    if report.verified is not None:
        rate += f"; {count(report.verified, 'parameter')} verified by checksum"
    if report.merge_error is not None:
        rate += f"; rounding takes {report.merge_error:.0%} of the adapters' size"
    return (
        f"Weights version {report.weight_version} handed to the engine: "
        f"{count(report.tensors, 'tensor')}, {data_size(report.bytes)} "
        f"in {duration(report.seconds)}{rate}"
    )


register(SyncReport, lambda report: tag("div", f"✓ {sync_line(report)}"), sync_line)
