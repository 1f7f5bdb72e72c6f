"""Find the runs of a folder, choose and sort them, and show them as a table.

A run is read as far as it came: one that was killed has no `result.json`, an older one has no
`params.yaml`. What is missing is None.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kit.errors import RunError, did_you_mean
from kit.reports.runs import RESULT, Process, RunInfo, WhatFailed, held_out, known_headline
from kit.runs import result as run_result
from kit.runs.progress import say
from kit.runs.sweep.state import SIGNS, STYLES, read_sweep
from kit.tracking.run_files import LARGEST_STEP, RunFiles, told
from kit.tracking.run_folder import (
    FORKS,
    LAST,
    NAMED,
    NOTEBOOK,
    PARAMETERS,
    RUNS,
    SIGNS_AT_END,
    SWEEP,
    age,
    entries,
    find_place,
    forks_of,
    is_fork,
    is_run,
    is_sweep,
    when,
)
from kit.utils.formatting import count, duration, number, shorten, visible
from kit.utils.strict_yaml import from_yaml

UNREADABLE = "unreadable"
"""Status of a run or a sweep of which nothing can be read that says how it ended."""
MOST_TOLD = 10
"""Runs of which the table says what cannot be read; `kit runs --json` has it of all."""


def read_run(folder: str | Path, sweep: str | None = None, state: str = "") -> RunInfo:
    """Read a run from its files.

    Args:
        folder: the run's.
        sweep: the name of the sweep that it belongs to.
        state: what that sweep says of it.
    """
    place = Path(folder).resolve()
    files = RunFiles(place)
    result = _as_recorded(_Result, files.object(RESULT), files)
    recorded = _as_recorded(_Headline, known_headline(result.headline), files)
    headline = run_result.headline(files)
    headline |= {n: value for n, value in recorded.model_dump(exclude_unset=True).items()}
    parameters = files.settings(PARAMETERS) or result.parameters
    seed = run_result.seed(files) if result.seed is None else result.seed
    if not os.access(place, os.R_OK | os.X_OK):
        files.fault(place.name, "it may not be looked into")
    named = NAMED.match(place.name)
    return RunInfo(
        folder=place,
        notebook=Path(result.notebook or (named[2] if named else place.name)).stem,
        status=_status(result, files, state),
        started=when(result.started, named[1] if named else ""),
        seconds=result.seconds,
        parameters=parameters,
        seed=seed,
        versions=result.versions,
        git_commit=result.git_commit,
        machine=result.machine,
        sweep=sweep,
        error=f"{result.error.name}: {result.error.message}" if result.error else None,
        faults=tuple(files.faults),
        **headline,
    )


Amount = Annotated[float, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]


class _Headline(BaseModel):
    """The numbers of a record's headline, as older versions had them too."""

    steps: int = Field(default=0, ge=0, le=LARGEST_STEP)
    reward_first: Amount | None = None
    reward_last: Amount | None = None
    tokens_per_second: float | None = Field(default=None, ge=0, le=1e15)
    dataset: str | None = None
    mean_reward_before: Amount | None = None
    mean_reward_after: Amount | None = None
    accuracy_before: Amount | None = None
    accuracy_after: Amount | None = None


class _Result(BaseModel):
    """What is taken of a `result.json` of any version."""

    status: str = ""
    notebook: str = ""
    started: str = ""
    seconds: float | None = Field(default=None, ge=0, le=1e10)
    parameters: dict[str, Any] = {}
    headline: dict[str, Any] = {}
    seed: int | None = None
    versions: dict[str, str | None] = {}
    git_commit: str | None = None
    machine: dict[str, Any] = {}
    process: Process | None = None
    error: WhatFailed | None = None

    @field_validator("machine", mode="before")
    @classmethod
    def _by_name(cls, machine: Any) -> Any:
        return {"machine": machine} if isinstance(machine, str) else machine or {}


_M = TypeVar("_M", bound=BaseModel)


def _as_recorded(model: type[_M], row: Mapping[str, Any], files: RunFiles) -> _M:
    """The row as a model, without what is not of its type, which `files` gets to know."""
    given = {name: value for name, value in row.items() if value is not None}
    try:
        return model.model_validate(given)
    except ValidationError as error:
        for each in error.errors():
            name = str(each["loc"][0])
            given.pop(name, None)
            files.fault(f"{RESULT}, {name}", each["msg"][:1].lower() + each["msg"][1:])
        return model.model_validate(given)


def _status(result: _Result, files: RunFiles, state: str) -> str:
    """Status of a run: its sweep's, if that stopped it early, else its own."""
    executed = any(os.path.isfile(files.folder / name) for name in (NOTEBOOK, PARAMETERS))
    lost = files.faults and (not executed or files.faults[0].startswith(RESULT))
    status = result.status or (UNREADABLE if lost else "unfinished" if executed else "")
    if status == "running" and result.process and not result.process.lives:
        status = "killed"
    return "stopped" if state == "stopped" else status


def forks(run: RunInfo) -> list[RunInfo]:
    """The forks of a run's session, each with records of its own, by their names."""
    return [
        replace(
            read_run(folder, run.sweep),
            notebook=run.notebook,
            status=run.status,
            started=run.started,
            parameters=run.parameters,
            versions=run.versions,
            git_commit=run.git_commit,
            machine=run.machine,
            fork_of=run.name,
        )
        for folder in forks_of(run.folder)
    ]


def find_runs(root: str | Path) -> list[RunInfo]:
    """Every run in a folder, those of its sweeps included, the newest first; each before its forks.

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
    if is_sweep(place):
        found = members(place)
    else:
        found = []
        for folder in entries(place):
            found += _members_or_why_not(folder) if is_sweep(folder) else [read_run(folder)]
    found.sort(key=lambda run: age(run.folder, run.started), reverse=True)
    return [each for run in found for each in (run, *forks(run))]


def members(sweep: Path) -> list[RunInfo]:
    """The runs of a sweep's members that were started, in their order.

    Raises:
        RunError: the sweep cannot be read.
    """
    started = [member for member in read_sweep(sweep).members if member.folder]
    folders = ((sweep / (member.folder or ""), member.state) for member in started)
    name = sweep.resolve().name
    return [read_run(folder, name, state) for folder, state in folders if is_run(folder)]


def _members_or_why_not(sweep: Path) -> list[RunInfo]:
    """The runs of a sweep; where it cannot be read, it is itself a row that says why."""
    try:
        return members(sweep)
    except RunError as error:
        named = NAMED.match(sweep.name)
        return [
            RunInfo(
                folder=sweep.resolve(),
                notebook=named[2] if named else sweep.name,
                status=UNREADABLE,
                started=when("", named[1] if named else ""),
                sweep=sweep.name,
                faults=(shorten(f"{SWEEP}: {error.why or error.what}", 300),),
            )
        ]


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
        elif is_fork(place):
            runs = [fork for fork in forks(read_run(place.parents[1])) if fork.folder == place]
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
    numbers = all(type(fact(run)) in (int, float) for run in known)
    words = not numbers and fact is not _FACTS["when"]
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
            Text(visible(handles[run.name]), style="bold"),
            f"{run.started:%d %b %H:%M}" if run.started else "–",
            Text(shorten(run.notebook, 32)),
            Text(shorten(f"{sign} {run.status}".strip(), 20), style=STYLES.get(run.status, "")),
            str(run.steps) if run.steps else "–",
            _change(run.reward_first, run.reward_last, lambda value: number(value, 3)),
            _held_out(run),
            f"{run.tokens_per_second:,.0f}" if run.tokens_per_second else "–",
            duration(run.seconds) if run.seconds is not None else "–",
            Text(" ".join(f"{visible(n)}={shorten(str(run.parameters[n]), 40)}" for n in given)),
        )
    console.print(table)
    for run in [run for run in runs if run.faults][:MOST_TOLD]:
        say(console, f"! {run.name}: {told(run.faults)}", "yellow")
    inner = sum(run.sweep is not None for run in runs)
    words = f"{count(len(runs), 'run')} in {where}"
    words += f", {inner} of them members of sweeps" if inner else ""
    forked = sum(run.fork_of is not None for run in runs)
    words += f", {forked} of them forks" if forked else ""
    names = f"{handles[runs[0].name]} {handles[runs[-1].name]}"
    names += "" if where == str(RUNS) else f" --in {where}"
    further = f" Side by side: kit compare {names}" if len(runs) > 1 else ""
    say(console, f"{words}.{further}", "dim")


def _handles(runs: Sequence[RunInfo]) -> dict[str, str]:
    """Short handle of each run: the last six characters if unique, else its name."""
    short = {run.name: _handle(run) for run in runs}
    used = [*short.values()]
    return {name: handle if used.count(handle) == 1 else name for name, handle in short.items()}


def _handle(run: RunInfo) -> str:
    whole, own = run.fork_of or run.name, run.folder.name
    found = SIGNS_AT_END.search(whole)
    handle = found[1] if found else whole
    return f"{handle}/{FORKS}/{own}" if run.fork_of else handle


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
        meant = from_yaml(wanted)
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
