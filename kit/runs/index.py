"""Find the runs of a folder, choose and sort them, and show them as a table.

A run is read as far as it came: one that was killed has no `result.json`, an older one has no
`params.yaml`. What is missing is None.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kit.errors import RunError, did_you_mean
from kit.reports.runs import RESULT, Process, RunInfo, held_out, known_headline
from kit.runs import result as run_result
from kit.runs.progress import say
from kit.runs.sweep.state import SIGNS, STYLES, read_sweep
from kit.tracking.run_folder import (
    LAST,
    NAMED,
    NOTEBOOK,
    PARAMETERS,
    RUNS,
    SIGNS_AT_END,
    age,
    find_place,
    is_run,
    is_sweep,
    read_object,
    read_yaml,
    when,
)
from kit.utils.formatting import count, duration, number, shorten


def read_run(folder: str | Path, sweep: str | None = None, state: str = "") -> RunInfo:
    """Read a run from its files.

    Args:
        folder: the run's.
        sweep: the name of the sweep that it belongs to.
        state: what that sweep says of it.
    """
    place = Path(folder).resolve()
    result = read_object(place / RESULT)
    recorded = known_headline(result.get("headline") or {})
    headline = run_result.headline(place)
    headline |= {name: recorded[name] for name in headline if name in recorded}
    named = NAMED.match(place.name)
    machine = result.get("machine") or {}
    error = result.get("error") or {}
    executed = any((place / name).is_file() for name in (NOTEBOOK, PARAMETERS))
    return RunInfo(
        folder=place,
        notebook=Path(str(result.get("notebook") or (named[2] if named else place.name))).stem,
        status=_status(result, executed, state),
        started=when(result.get("started"), named[1] if named else ""),
        seconds=result.get("seconds"),
        parameters=read_yaml(place / PARAMETERS) or dict(result.get("parameters") or {}),
        seed=run_result.seed(place) if result.get("seed") is None else result["seed"],
        versions=dict(result.get("versions") or {}),
        git_commit=result.get("git_commit"),
        machine=machine if isinstance(machine, dict) else {"machine": machine},
        sweep=sweep,
        error=f"{error.get('name')}: {error.get('message')}" if error else None,
        **headline,
    )


def _status(result: Mapping[str, Any], executed: bool, state: str) -> str:
    """Status of a run: its sweep's, if that stopped it early, else its own."""
    status = str(result.get("status") or ("unfinished" if executed else ""))
    if status == "running":
        with suppress(ValidationError):
            status = "running" if Process.model_validate(result.get("process")).lives else "killed"
    return "stopped" if state == "stopped" else status


def find_runs(root: str | Path) -> list[RunInfo]:
    """Every run in a folder, those of its sweeps included, the newest first.

    Args:
        root: a folder of runs, or of one sweep.

    Raises:
        RunError: there is no such folder.
    """
    place = Path(root)
    if not place.is_dir():
        raise RunError(
            f"There is no folder {str(root)!r}.",
            fix="name the folder that runs are kept in; `kit run` makes papermill_runs where it "
            "is called.",
        )
    found = members(place) if is_sweep(place) else []
    for folder in place.iterdir() if not is_sweep(place) else ():
        if is_sweep(folder):
            found += members(folder)
        elif is_run(folder):
            found.append(read_run(folder))
    return sorted(found, key=lambda run: age(run.folder, run.started), reverse=True)


def members(sweep: Path) -> list[RunInfo]:
    """The runs of a sweep's members that were started, in their order."""
    started = [member for member in read_sweep(sweep).members if member.folder]
    folders = ((sweep / (member.folder or ""), member.state) for member in started)
    name = sweep.resolve().name
    return [read_run(folder, name, state) for folder, state in folders if is_run(folder)]


def resolve(names: Sequence[str | Path], root: str | Path) -> list[RunInfo]:
    """The runs that are meant, in the order of their names; a sweep stands for all its members.

    `last` alone may be a sweep; beside other names, `last` and `last~1` count runs, those of sweeps
    too.

    Args:
        names: folders; or in `root` names, as `run_folder.find_place` takes them.
        root: the folder that runs are kept in.

    Raises:
        RunError: nothing has that name, or several have; the message lists them.
    """
    found: dict[Path, RunInfo] = {}
    newest = find_runs(root) if len(names) > 1 and any(map(LAST.match, map(str, names))) else []
    for name in names:
        if newest and (last := LAST.match(str(name))):
            back = int(last[1] or 0)
            place = newest[back].folder if back < len(newest) else find_place(name, root)
        else:
            place = find_place(name, root).resolve()
        if is_sweep(place):
            runs = members(place)
        else:
            beside = members(place.parent) if is_sweep(place.parent) else []
            runs = [run for run in beside if run.folder == place] or [read_run(place)]
        if not runs:
            raise RunError(f"None of the members of {place.name} was started yet.")
        found |= {run.folder: run for run in runs}
    return [*found.values()]


def differing(runs: Iterable[RunInfo]) -> list[str]:
    """Names of parameters in which runs of the same notebook differ."""
    seen: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for name, value in run.parameters.items():
            seen.setdefault((run.notebook, name), set()).add(json.dumps(value, default=str))
    return [*dict.fromkeys(name for (_, name), values in seen.items() if len(values) > 1)]


_FACTS: dict[str, Callable[[RunInfo], Any]] = {
    "when": lambda run: run.started,
    "notebook": lambda run: run.notebook,
    "status": lambda run: run.status,
    "steps": lambda run: run.steps,
    "reward": lambda run: run.reward_last,
    "held_out": lambda run: run.mean_reward_after,
    "accuracy": lambda run: run.accuracy_after,
    "tokens_per_second": lambda run: run.tokens_per_second,
    "duration": lambda run: run.seconds,
    "seed": lambda run: run.seed,
    "sweep": lambda run: run.sweep,
    "commit": lambda run: run.git_commit,
}
"""What runs are chosen and sorted by, beside their parameters."""

_ASCENDING = ("notebook", "status", "sweep", "commit", "seed")
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


def sort_runs(runs: Sequence[RunInfo], by: str) -> list[RunInfo]:
    """Sort runs by a fact or a parameter: highest and newest first, words from A to Z; those of
    which it is not known at the end. With `-` before the name, the other way round.

    Raises:
        RunError: no run has such a fact or parameter.
    """
    name = by.removeprefix("-")
    fact = _fact(runs, name)
    known = [run for run in runs if fact(run) is not None]
    words = any(isinstance(fact(run), (str, bool, list, dict)) for run in known)
    key: Callable[[RunInfo], Any] = (lambda run: str(fact(run))) if words else fact
    down = (not words and name not in _ASCENDING) is not by.startswith("-")
    return [*sorted(known, key=key, reverse=down), *(r for r in runs if fact(r) is None)]


def show_runs(runs: Sequence[RunInfo], console: Console, where: str) -> None:
    """Print the table of these runs, which are in the folder `where`."""
    if not runs:
        say(console, f"No runs in {where}.")
        return
    varied = differing(runs)
    table = Table(box=None, pad_edge=False)
    for name in ("run", "when", "notebook", "status"):
        table.add_column(name, no_wrap=True)
    for name in ("steps", "reward", "held out", "tokens/s", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("parameters that differ", overflow="fold")
    handles = _handles(runs)
    for run in runs:
        sign = SIGNS.get(run.status, "")
        given = (name for name in varied if name in run.parameters)
        table.add_row(
            Text(handles[run.name], style="bold"),
            f"{run.started:%d %b %H:%M}" if run.started else "–",
            Text(shorten(run.notebook, 32)),
            Text(shorten(f"{sign} {run.status}".strip(), 20), style=STYLES.get(run.status, "")),
            str(run.steps) if run.steps else "–",
            _change(run.reward_first, run.reward_last, lambda value: number(value, 3)),
            _held_out(run),
            f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "–",
            duration(run.seconds) if run.seconds is not None else "–",
            Text(" ".join(f"{name}={shorten(str(run.parameters[name]), 40)}" for name in given)),
        )
    console.print(table)
    inner = sum(run.sweep is not None for run in runs)
    words = f"{count(len(runs), 'run')} in {where}"
    words += f", {inner} of them members of sweeps" if inner else ""
    names = f"{handles[runs[0].name]} {handles[runs[-1].name]}"
    names += "" if where == str(RUNS) else f" --in {where}"
    further = f" Side by side: kit compare {names}" if len(runs) > 1 else ""
    say(console, f"{words}.{further}", "dim")


def _handles(runs: Sequence[RunInfo]) -> dict[str, str]:
    """Short handle of each run: the last six characters if unique, else its name."""
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


def _held_out(run: RunInfo) -> str:
    return (
        held_out(
            (run.accuracy_before, run.accuracy_after),
            (run.mean_reward_before, run.mean_reward_after),
        )[1]
        or "–"
    )


def _change(first: float | None, last: float | None, say: Callable[[float], str]) -> str:
    if first is None and last is None:
        return "–"
    ends = ["–" if value is None else say(value) for value in (first, last)]
    return " → ".join(ends)
