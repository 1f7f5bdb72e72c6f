"""`WhatIf`: the same update in several ways, one column each, and the tokens that moved."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from markupsafe import Markup

from kit.viz.html import Child, Column, bar, facts, fold, join, note, table, tag, title
from kit.viz.metrics import meaning
from kit.viz.moved import moved_html, moved_plain, moves
from kit.viz.text import columns, count, duration, number, percent, shorten
from kit.viz.updates import mark, update_concerns
from kit.what_if import Movement, Trial, WhatIf

METRICS = (
    "train/lr",
    "train/loss",
    "train/grad_norm",
    "train/pg_clipfrac",
    "train/ppo_kl",
    "train/kl_loss",
    "train/entropy_loss",
)
"""What is shown of each update, as far as it is known and not the same everywhere."""
ALWAYS = ("train/lr", "train/loss", "train/grad_norm")
Moved = tuple[str, str, Callable[[Movement], float]]
MOVED: tuple[Moved, ...] = (
    ("praised tokens", "mean change of tokens with a positive advantage", lambda m: m.praised),
    ("blamed tokens", "mean change of tokens with a negative advantage", lambda m: m.blamed),
    ("mean |change|", "of a token's log-prob, in nats", lambda m: m.mean_abs),
    ("largest |change|", "of one token, in nats", lambda m: m.largest),
    (
        "KL old ‖ new",
        "distance of the new policy from the old one, in nats a token",
        lambda m: m.kl,
    ),
)
SIGNED = ("praised tokens", "blamed tokens")
AS_MEANT = "share of tokens that moved the way their advantage points"


def what_if_html(report: WhatIf) -> Markup:
    """Where the trials began, a table of them, and for each the tokens that moved most."""
    heads = [Column("", "fit"), *(Column(_head(i, t), "num") for i, t in enumerate(report))]
    rows: list[list[Child]] = [
        [_named(name, meaning(name).words), *(_metric(t, name) for t in report)]
        for name in _metrics(report)
    ]
    rows += [[_named(name, words), *_bars(report, name, value)] for name, words, value in MOVED]
    rows.append([_named("as meant", AS_MEANT), *map(_as_meant, report)])
    return join(
        (
            title(_title(report)),
            facts(_facts(report)),
            *(note(f"! {words}") for words in report.notes),
            table([*heads], rows),
            *(_refusal(i, t) for i, t in enumerate(report) if t.refused),
            *(_tokens(report, i, t) for i, t in enumerate(report) if t.after is not None),
            note(_next(report)),
        )
    )


def what_if_plain(report: WhatIf) -> str:
    """The same for a terminal."""
    rows = [["", *(_head(i, t) for i, t in enumerate(report))]]
    rows += [
        [name.removeprefix("train/"), *(_metric(t, name) for t in report)]
        for name in _metrics(report)
    ]
    rows += [[name, *(_nats(t, value, name in SIGNED) for t in report)] for name, _, value in MOVED]
    rows.append(["as meant", *map(_as_meant, report)])
    lines = [_title(report), "  " + "   ".join(f"{k} {v}" for k, v in _facts(report))]
    lines += [f"  ! {words}" for words in report.notes]
    lines.append(columns(rows))
    for index, trial in enumerate(report):
        if trial.refused:
            lines.append(f"  {index} was refused: {shorten(trial.refused, 200)}")
        elif trial.after is not None:
            lines += [f"  {_head(index, trial)}", moved_plain(moves(report.before, trial.after))]
    return "\n".join([*lines, f"  {_next(report)}"])


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


def _next(report: WhatIf) -> str:
    last = len(report) - 1
    return (
        f"session.keep(tried, {last}) makes the update of {last} for good, where `tried` is this "
        "result. Nothing was kept so far: weights, optimizer and engine are as before."
    )


def _head(index: int, trial: Trial) -> str:
    return f"{index} · {shorten(trial.label, 60)}"


def _named(name: str, words: str) -> Markup:
    return join(
        (
            tag("b", name.removeprefix("train/")),
            tag("div", words, class_="kv-muted"),
        )
    )


def _metrics(report: WhatIf) -> list[str]:
    """Those that somebody logged, without those that are 0 in every column."""

    def shown(name: str) -> bool:
        values = [t.update.metrics[name] for t in report if t.update and name in t.update.metrics]
        return bool(values) and (name in ALWAYS or any(map(_is_there, values)))

    return [name for name in METRICS if shown(name)]


def _is_there(value: float) -> bool:
    return not abs(value) < 1e-7


def _metric(trial: Trial, name: str) -> str:
    if trial.update is None:
        return "refused"
    off = mark(name, update_concerns(trial.update)) == "!"
    return number(trial.update.metrics.get(name), 3) + (" !" if off else "")


def _bars(report: WhatIf, name: str, value: Callable[[Movement], float]) -> Sequence[Child]:
    values = [value(t.movement) if t.movement else math.nan for t in report]
    scale = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    signed = name in SIGNED
    return [
        join((tag("div", _nats(t, value, signed)), bar(v, scale, signed=signed)))
        for t, v in zip(report, values, strict=True)
    ]


def _nats(trial: Trial, value: Callable[[Movement], float], signed: bool) -> str:
    if trial.movement is None:
        return "–"
    found = value(trial.movement)
    if math.isnan(found):
        return "–"
    sign = "▲ " if found > 0 else "▼ " if found < 0 else ""
    return f"{sign}{found:+.3g}" if signed else f"{found:.3g}"


def _as_meant(trial: Trial) -> str:
    return percent(trial.movement.as_meant) if trial.movement else "–"


def _refusal(index: int, trial: Trial) -> Markup:
    return note(f"{index} was refused: {shorten(trial.refused, 300)}")


def _tokens(report: WhatIf, index: int, trial: Trial) -> Markup:
    assert trial.after is not None
    found = moves(report.before, trial.after)
    return fold(f"tokens that moved most: {_head(index, trial)}", moved_html(found))
