"""Runs chosen, put in order, and shown as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kit.errors import RunError, did_you_mean
from kit.runs.finding import RUNS, SIGNS_AT_END
from kit.runs.listing import RunInfo, differing
from kit.viz.text import count, duration, number, percent, shorten

_SIGNS = {
    "completed": "✓",
    "failed": "✗",
    "interrupted": "‖",
    "stopped": "■",
    "running": "▶",
    "killed": "✗",
    "unfinished": "?",
}
_STYLES = {"completed": "green", "failed": "red", "killed": "red", "running": "cyan"}

_FACTS: dict[str, Callable[[RunInfo], Any]] = {
    "when": lambda run: run.started,
    "notebook": lambda run: run.notebook,
    "status": lambda run: run.status,
    "steps": lambda run: run.steps,
    "reward": lambda run: run.reward_last,
    "accuracy": lambda run: run.accuracy_after,
    "duration": lambda run: run.seconds,
    "seed": lambda run: run.seed,
    "sweep": lambda run: run.sweep,
    "commit": lambda run: run.git_commit,
}
"""What runs are chosen and sorted by, beside their parameters."""
_UPWARDS = ("notebook", "status", "sweep", "commit", "seed")
"""Sorted from A to Z; of the rest, the largest and the newest come first."""


def choose(runs: Sequence[RunInfo], conditions: str) -> list[RunInfo]:
    """The runs that meet all conditions.

    Args:
        runs: any.
        conditions: `status=completed,lr=1e-4`: facts and parameters, with the value each must
            have; `!=` for one it must not. Numbers are compared as numbers, words also by their
            beginning.

    Raises:
        RunError: a condition cannot be read, or no run has such a fact or parameter.
    """
    chosen = list(runs)
    for condition in filter(None, (part.strip() for part in conditions.split(","))):
        name, equals, wanted = condition.partition("=")
        unlike = name.endswith("!")
        name = name.rstrip("!").strip()
        if not equals:
            raise RunError(
                f"--filter does not understand {condition!r}.",
                fix="write NAME=VALUE, such as --filter status=completed,steps=60.",
            )
        fact = _fact(runs, name)
        chosen = [run for run in chosen if _equal(fact(run), wanted.strip()) is not unlike]
    return chosen


def put_in_order(runs: Sequence[RunInfo], by: str) -> list[RunInfo]:
    """Runs by a fact or a parameter: highest, longest, newest first, words from A to Z; those of
    which it is not known at the end. With `-` before the name, the other way round.

    Raises:
        RunError: no run has such a fact or parameter.
    """
    name = by.removeprefix("-")
    fact = _fact(runs, name)
    known = [run for run in runs if fact(run) is not None]
    words = any(isinstance(fact(run), (str, bool, list, dict)) for run in known)
    key: Callable[[RunInfo], Any] = (lambda run: str(fact(run))) if words else fact
    down = (not words and name not in _UPWARDS) is not by.startswith("-")
    return [*sorted(known, key=key, reverse=down), *(r for r in runs if fact(r) is None)]


def show_runs(runs: Sequence[RunInfo], console: Console, where: str) -> None:
    """Print the table of these runs, which are in the folder `where`."""
    if not runs:
        console.print(f"No runs in {where}.", markup=False, highlight=False)
        return
    varied = differing(runs)
    table = Table(box=None, pad_edge=False)
    for name in ("run", "when", "notebook", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "reward", "accuracy", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("parameters that differ", overflow="fold")
    handles = _handles(runs)
    for run in runs:
        sign = _SIGNS.get(run.status, "")
        table.add_row(
            Text(handles[run.name], style="bold"),
            f"{run.started:%d %b %H:%M}" if run.started else "–",
            Text(shorten(run.notebook, 32)),
            Text(shorten(f"{sign} {run.status}".strip(), 20), style=_STYLES.get(run.status, "")),
            str(run.steps) if run.steps else "–",
            _change(run.reward_first, run.reward_last, lambda value: number(value, 3)),
            _change(run.accuracy_before, run.accuracy_after, percent),
            duration(run.seconds) if run.seconds is not None else "–",
            Text(_parameters(run, varied)),
        )
    console.print(table)
    inner = sum(run.sweep is not None for run in runs)
    words = f"{count(len(runs), 'run')} in {where}"
    words += f", {inner} of them members of sweeps" if inner else ""
    names = f"{handles[runs[0].name]} {handles[runs[-1].name]}"
    names += "" if where == str(RUNS) else f" --in {where}"
    further = f" Side by side: kit compare {names}" if len(runs) > 1 else ""
    console.print(
        f"{words}.{further}",
        markup=False,
        highlight=False,
        soft_wrap=True,
        style="dim",
    )


def _handles(runs: Sequence[RunInfo]) -> dict[str, str]:
    """By name: the six signs at its end, where they tell a run apart, else its whole name."""
    signs = {run.name: SIGNS_AT_END.search(run.name) for run in runs}
    short = {name: found[1] if found else name for name, found in signs.items()}
    used = [*short.values()]
    return {name: handle if used.count(handle) == 1 else name for name, handle in short.items()}


def _fact(runs: Sequence[RunInfo], name: str) -> Callable[[RunInfo], Any]:
    parameters = {key for run in runs for key in run.parameters}
    if name in parameters and name not in _FACTS:
        return lambda run: run.parameters.get(name)
    if name in _FACTS:
        return _FACTS[name]
    raise RunError(f"No run has a {name!r}.", fix=did_you_mean(name, {*_FACTS, *parameters}))


def _equal(value: Any, wanted: str) -> bool:
    if isinstance(value, str):
        return value == wanted or value.startswith(wanted) if wanted else not value
    if value is None:
        return wanted.lower() in ("", "none", "null")
    try:
        meant = yaml.safe_load(wanted)
    except yaml.YAMLError:
        return str(value) == wanted
    if isinstance(value, bool) or isinstance(meant, bool):
        return value is meant
    if isinstance(value, (int, float)):
        try:
            return float(value) == float(wanted)  # YAML takes 1e-4 for a word
        except ValueError:
            return False
    return bool(value == meant) or str(value).startswith(wanted)


def _parameters(run: RunInfo, varied: Sequence[str]) -> str:
    given = ((name, run.parameters[name]) for name in varied if name in run.parameters)
    return " ".join(f"{name}={shorten(str(value), 40)}" for name, value in given)


def _change(first: float | None, last: float | None, say: Callable[[float], str]) -> str:
    if first is None and last is None:
        return "–"
    ends = ["–" if value is None else say(value) for value in (first, last)]
    return " → ".join(ends)
