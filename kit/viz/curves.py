"""Curves as numbers: from the rows and evaluations of a training run to points that can be drawn.

Not-a-number values are left out of a curve and counted, so that a gap has an explanation.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from kit.reports import REWARD, STEP, TrainReport
from kit.utils.formatting import mean, number, shorten

Points = list[tuple[float, float]]
"""(step, value), in the order of the steps."""
Row = Mapping[str, Any]
"""The metrics of one step; `step` says which where it is there."""
SMOOTHED_FROM = 30
"""From so many points on, a running mean is drawn over them."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A metric over the steps."""

    name: str
    points: Points
    dropped: int = 0
    """Steps whose value was not a finite number."""
    evaluations: dict[str, Points] = field(default_factory=dict)
    """Held-out results to draw over it, by metric name (`eval/...`)."""


def rows_of(report: TrainReport) -> list[dict[str, Any]]:
    """The history of a run, each row with its step.

    Rows are numbered back from the last step of `steps`, because the history reaches back to the
    session's first step and `steps` holds only those of one call.
    """
    history: Sequence[Row] = report.history or [
        {STEP: step.step, **step.metrics} for step in report.steps
    ]
    last = report.steps[-1].step if report.steps else len(history) - 1
    return numbered(history, last)


def numbered(history: Sequence[Row], last: int) -> list[dict[str, Any]]:
    """Rows with their steps; those without a number are counted back from the last one."""
    start = last - len(history) + 1
    return [{STEP: start + index, **row} for index, row in enumerate(history)]


def evaluations_of(report: TrainReport) -> dict[str, Points]:
    """Every evaluation of a run once, by metric name."""
    during = [step.evaluation for step in report.steps if step.evaluation]
    by_name: dict[str, dict[float, float]] = {}
    for evaluation in (e for each in (*report.evaluations, *during) for e in each.sets.values()):
        points = by_name.setdefault(f"eval/{evaluation.dataset}", {})
        if math.isfinite(evaluation.mean_reward):
            points[float(evaluation.step)] = evaluation.mean_reward
    return {name: sorted(points.items()) for name, points in by_name.items()}


def curve(rows: Sequence[Row], name: str) -> Curve:
    """Curve of one metric; rows without it are left out."""
    points: Points = []
    dropped = 0
    for index, row in enumerate(rows):
        value = row.get(name)
        if value is None or isinstance(value, (str, bool)):
            continue
        if math.isfinite(value):
            points.append((float(row.get("step", index)), float(value)))
        else:
            dropped += 1
    return Curve(name, points, dropped)


def _logged_evaluations(rows: Sequence[Row]) -> dict[str, Points]:
    """The `eval/...` metrics that are in the rows themselves."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/"))
    return {name: points for name in names if (points := curve(rows, name).points)}


def run_curves(
    rows: Sequence[Row], names: Iterable[str], evaluations: Mapping[str, Points]
) -> list[Curve]:
    """The curves to draw. Evaluations go over the reward, which has their unit."""
    held_out = {k: v for k, v in {**_logged_evaluations(rows), **evaluations}.items() if v}
    drawn = [curve(rows, name) for name in names]
    return [replace(one, evaluations=held_out) if one.name == REWARD else one for one in drawn]


def smooth(points: Points, window: int, every: int = 1) -> Points:
    """The mean over the last `window` points, at the last point and at every so many before it."""
    values = [value for _, value in points]
    places = range((len(points) - 1) % every, len(points), every)
    return [(points[i][0], mean(values[max(0, i - window + 1) : i + 1])) for i in places]


def in_words(curve: Curve) -> str:
    """First and last value, for those who do not see the drawing."""
    if not curve.points:
        words = f"{shorten(curve.name, 60)}: {'no finite value' if curve.dropped else 'not logged'}"
    else:
        (first, start), (last, end) = curve.points[0], curve.points[-1]
        words = (
            f"{shorten(curve.name, 60)}: {number(start)} at step {number(first)}, "
            f"{number(end)} at step {number(last)}"
        )
    for name, points in curve.evaluations.items():
        words += f"; {shorten(name, 60)}: {number(points[0][1])} to {number(points[-1][1])}"
    return words
