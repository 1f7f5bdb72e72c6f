"""The runs that a folder holds, each as a row of facts.

A run is read as far as it came: one that was killed has no `result.json`, an older one has no
`params.yaml`. What is missing is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from kit.errors import RunError
from kit.runs import outcome
from kit.runs.finding import NAMED, PARAMETERS, age, find_place, is_run, read_object, when
from kit.runs.result import RESULT, Process
from kit.runs.sweep_state import is_sweep, read_sweep


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known of a run without looking at its single steps."""

    folder: Path
    notebook: str
    """Its name, without the folder."""
    status: str
    """completed, failed, interrupted, running, killed; stopped for a member that its sweep ended
    early; unfinished where nothing says how it ended; empty for what a session wrote by itself."""
    started: datetime | None = None
    seconds: float | None = None
    steps: int = 0
    reward_first: float | None = None
    reward_last: float | None = None
    dataset: str | None = None
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    git_commit: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    """The name of its sweep's folder."""
    error: str | None = None

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    def to_json(self) -> dict[str, Any]:
        """Plain types only."""
        row = asdict(self) | {"folder": str(self.folder), "name": self.name}
        return row | {"started": self.started.isoformat() if self.started else None}


def read_run(folder: str | Path, sweep: str | None = None, state: str = "") -> RunInfo:
    """A run as its files tell of it.

    Args:
        folder: the run's.
        sweep: the name of the sweep that it belongs to.
        state: what that sweep says of it.
    """
    place = Path(folder).resolve()
    result = read_object(place / RESULT)
    headline = outcome.headline(place) | _known(result.get("headline"))
    named = NAMED.match(place.name)
    machine = result.get("machine") or {}
    error = result.get("error") or {}
    executed = any((place / name).is_file() for name in ("notebook.ipynb", PARAMETERS))
    return RunInfo(
        folder=place,
        notebook=Path(str(result.get("notebook") or (named[2] if named else place.name))).stem,
        status=_status(result, executed, state),
        started=when(result.get("started"), named[1] if named else ""),
        seconds=result.get("seconds"),
        parameters=_yaml(place / PARAMETERS) or dict(result.get("parameters") or {}),
        seed=outcome.seed(place) if result.get("seed") is None else result["seed"],
        versions=dict(result.get("versions") or {}),
        git_commit=result.get("git_commit"),
        machine=machine if isinstance(machine, dict) else {"machine": machine},
        sweep=sweep,
        error=f"{error.get('name')}: {error.get('message')}" if error else None,
        steps=headline["steps"],
        reward_first=headline["reward_first"],
        reward_last=headline["reward_last"],
        dataset=headline["dataset"],
        accuracy_before=headline["accuracy_before"],
        accuracy_after=headline["accuracy_after"],
    )


def _status(result: Mapping[str, Any], executed: bool, state: str) -> str:
    """How a run ended: as its sweep says where it was stopped early, else as it says itself."""
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

    Args:
        names: folders; or in `root` names, as `finding.find_place` takes them.
        root: the folder that runs are kept in.

    Raises:
        RunError: nothing has that name, or several have; the message lists them.
    """
    found: dict[Path, RunInfo] = {}
    for name in names:
        place = find_place(name, root)
        if is_sweep(place):
            runs = members(place)
        else:
            sweep = place.parent
            runs = (
                [read_run(place)]
                if not is_sweep(sweep)
                else [run for run in members(sweep) if run.folder == place.resolve()]
                or [read_run(place)]
            )
        if not runs:
            raise RunError(f"None of the members of {place.name} was started yet.")
        found |= {run.folder: run for run in runs}
    return [*found.values()]


def _known(row: object) -> dict[str, Any]:
    """What a row holds that is not None."""
    return {k: v for k, v in row.items() if v is not None} if isinstance(row, dict) else {}


def _yaml(file: Path) -> dict[str, Any]:
    try:
        row = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return row if isinstance(row, dict) else {}


def differing(runs: Iterable[RunInfo]) -> list[str]:
    """Names of parameters in which runs of the same notebook differ."""
    seen: dict[tuple[str, str], set[str]] = {}
    for run in runs:
        for name, value in run.parameters.items():
            seen.setdefault((run.notebook, name), set()).add(json.dumps(value, default=str))
    return [*dict.fromkeys(name for (_, name), values in seen.items() if len(values) > 1)]
