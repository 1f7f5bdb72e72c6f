"""`WhatIf`: the same update in several ways, one row each, and the tokens that moved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from markupsafe import Markup

from kit.reports.what_if import Movement, Trial, WhatIf
from kit.tracking.catalog import meaning
from kit.utils.formatting import columns, count, duration, named, number, percent, shorten
from kit.viz.html import Child, Column, bar, facts, fold, join, note, numeric, table, tag, title
from kit.viz.render import register
from kit.viz.reports.update import mark, update_concerns
from kit.viz.samples.compare import moved_html, moved_plain, moves

METRICS = (
    "train/loss",
    "train/grad_norm",
    "train/entropy_loss",
    "train/lr",
    "train/pg_clipfrac",
    "train/ppo_kl",
    "train/kl_loss",
)
"""What is shown of an update's own metrics: once where all trials agree, else by trial."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A column that says how far an update moved the tokens."""

    name: str
    words: str
    value: Callable[[Movement], float]
    signed: bool = False


MOVED = (
    Moved("praised", "mean change of tokens with a positive advantage", lambda m: m.praised, True),
    Moved("blamed", "mean change of tokens with a negative advantage", lambda m: m.blamed, True),
    Moved("largest", "the largest change of one token, up or down", lambda m: m.largest),
    Moved("KL old ‖ new", "distance of the new policy from the old one", lambda m: m.kl),
)
AS_MEANT = "share of the tokens that moved which did so the way their advantage points"
IN_NATS = "Changes are of log-probs, new minus old, and like the KL in nats a token."
NEXT = (
    "Nothing was kept: weights, optimizer and engine are as before. session.keep(tried, i) makes "
    "the update of row i for good, where `tried` is this result."
)


def _html(report: WhatIf) -> Markup:
    """Where the trials began, a table of them, and for each the tokens that moved most."""
    names = _differing(report)
    heads = [Column("", "fit"), Column("tried with")]
    heads += numeric(*map(_short, names), *(moved.name for moved in MOVED), "as meant")
    rows: list[list[Child]] = [
        [
            tag("b", str(index)),
            shorten(trial.label, 100),
            *(_metric(trial, name) for name in names),
            *(_bar(report, trial, moved) for moved in MOVED),
            _as_meant(trial),
        ]
        for index, trial in enumerate(report)
    ]
    refused = [(i, trial.refused) for i, trial in enumerate(report) if trial.refused]
    moved = [(_head(i, t), moves(report.before, t.after)) for i, t in enumerate(report) if t.after]
    return join(
        title(_title(report)),
        facts(_facts(report)),
        *(note(f"! {words}") for words in report.notes),
        table(heads, rows),
        note(_alike(report)) if _alike(report) else None,
        *(note(f"{i} was refused: {shorten(words, 300)}") for i, words in refused),
        fold("what the columns are", _glossary(names)),
        *(fold(f"tokens that moved most: {head}", moved_html(of)) for head, of in moved),
        note(NEXT),
    )


def _plain(report: WhatIf) -> str:
    names = _differing(report)
    rows = [["", "tried with", *map(_short, names), *(m.name for m in MOVED), "as meant"]]
    rows += [
        [
            str(index),
            shorten(trial.label, 40),
            *(_metric(trial, name) for name in names),
            *(_nats(trial, moved) for moved in MOVED),
            _as_meant(trial),
        ]
        for index, trial in enumerate(report)
    ]
    lines = [_title(report), named(_facts(report))]
    lines += [f"  ! {words}" for words in report.notes]
    lines += [columns(rows), *([f"  {_alike(report)}"] if _alike(report) else [])]
    for index, trial in enumerate(report):
        if trial.refused:
            lines.append(f"  {index} was refused: {shorten(trial.refused, 200)}")
        elif trial.after is not None:
            lines += [f"  {_head(index, trial)}", moved_plain(moves(report.before, trial.after))]
    return "\n".join([*lines, f"  {NEXT}"])


register(WhatIf, _html, _plain)


def _title(report: WhatIf) -> str:
    where = f"snapshot {report.snapshot!r}" if report.snapshot else "the present weights"
    ways = count(len(report), "way")
    return f"What if: one update from {where}, tried in {ways}, and taken back"


def _facts(report: WhatIf) -> list[tuple[str, str]]:
    return [
        ("of step", f"{report.step:,}"),
        ("samples", f"{len(report.batch):,}"),
        ("took", duration(report.seconds)),
    ]


def _head(index: int, trial: Trial) -> str:
    return f"{index} · {shorten(trial.label, 60)}"


def _short(name: str) -> str:
    return name.removeprefix("train/").replace("_", " ")


def _values(report: WhatIf, name: str) -> list[float]:
    return [t.update.metrics[name] for t in report if t.update and name in t.update.metrics]


def _differing(report: WhatIf) -> list[str]:
    return [name for name in METRICS if len({*_values(report, name)}) > 1]


def _alike(report: WhatIf) -> str:
    """The metrics that are equal in all trials, in words; empty where there are none."""
    values = [(name, _values(report, name)) for name in METRICS if name != "train/lr"]
    alike = [f"{_short(n)} {number(v[0], 3)}" for n, v in values if len({*v}) == 1 and v[0]]
    if not alike:
        return ""
    return f"The same in all: {', '.join(alike)}. They are measured before the weights move."


def _glossary(names: list[str]) -> Markup:
    rows: list[list[Child]] = [[_short(name), meaning(name).words] for name in names]
    rows += [[moved.name, moved.words] for moved in MOVED]
    rows.append(["as meant", AS_MEANT])
    return join(table([Column("column", "fit"), Column("what it is", "hint")], rows), note(IN_NATS))


def _metric(trial: Trial, name: str) -> str:
    if trial.update is None:
        return "refused"
    off = mark(name, update_concerns(trial.update)) == "!"
    return number(trial.update.metrics.get(name), 3) + (" !" if off else "")


def _bar(report: WhatIf, trial: Trial, moved: Moved) -> Markup:
    every = [moved.value(t.movement) for t in report if t.movement]
    scale = max((abs(v) for v in every if math.isfinite(v)), default=0.0)
    value = moved.value(trial.movement) if trial.movement else math.nan
    drawn = bar(value, scale, signed=moved.signed)
    return join(tag("div", _nats(trial, moved)), drawn)


def _nats(trial: Trial, moved: Moved) -> str:
    value = moved.value(trial.movement) if trial.movement else math.nan
    if math.isnan(value):
        return "–"
    if not moved.signed:
        return number(value, 3)
    return ("▲ " if value > 0 else "▼ " if value < 0 else "") + number(abs(value), 3)


def _as_meant(trial: Trial) -> str:
    return percent(trial.movement.as_meant) if trial.movement else "–"
