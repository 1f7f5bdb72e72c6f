"""A run's folder: its name and those of its files, how to find it, and how to read its rows."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from kit.errors import RunError, did_you_mean
from kit.reports.runs import RESULT
from kit.tracking.run_files import CONFIG as CONFIG
from kit.tracking.run_files import EVALUATIONS as EVALUATIONS
from kit.tracking.run_files import METRICS as METRICS
from kit.tracking.run_files import SAMPLES as SAMPLES
from kit.tracking.run_files import Row as Row
from kit.tracking.run_files import RunFiles
from kit.utils.files import runs_here

RUNS = runs_here()
NOTEBOOK = "notebook.ipynb"
PARAMETERS = "params.yaml"

UNDONE = "undone.jsonl"
CHANGES = "changes.jsonl"
INPUTS = "inputs.jsonl"
CHECKPOINTS = "checkpoints"
FINAL = "final"
FORKS = "forks"
"""What forks of a run's session write, each into a folder of its name that is a run's too."""
ATTEMPTS = "attempts"
"""What attempts wrote that were killed before the run was resumed; it goes when a run completes."""

SWEEP = "sweep.json"

MARKS = (RESULT, PARAMETERS, METRICS, CONFIG, NOTEBOOK)
"""Files of which a run's folder has one at least."""
NAMED = re.compile(r"(\d{8}-\d{6})-(.+?)(?:-([0-9a-f]{6}))?$")
"""When, which notebook, and the number that tells runs of the same second apart."""
SIGNS_AT_END = re.compile(r"-([0-9a-f]{6})$")
"""The shortest name of a run."""
LAST = re.compile(r"last(?:~(\d+))?$")


def new_name(stem: str) -> str:
    """The name of a new folder, as `NAMED` reads it."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{stem}-{secrets.token_hex(3)}"


def new_folder(root: Path, name: str, what: str = "run") -> Path:
    """Make `root/name`, with a number behind it where another run (or sweep) has taken that.

    Raises:
        RunError: it cannot be made.
    """
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise RunError(
                f"The {what}'s folder {folder} cannot be made.",
                why=str(error),
                fix="choose another place with --out.",
            ) from None
        else:
            return folder.resolve()


def find_run(name: str | Path, root: str | Path = RUNS) -> Path:
    """The folder of a run, or of one of a sweep's members.

    Args:
        name: a folder; or in `root` a name, as `find_place` takes it.
        root: the folder that runs are kept in.

    Raises:
        RunError: nothing has that name, or several have, or a sweep has it.
    """
    place = find_place(name, root, sweeps=False)
    if is_sweep(place):
        inner = sorted(folder.name for folder in entries(place))
        raise RunError(
            f"{place.name} is a sweep, and one run is meant.",
            fix=f"name one of its runs: {', '.join(inner[:8])}" if inner else "start it first.",
        )
    return place.resolve()


def find_place(name: str | Path, root: str | Path, *, sweeps: bool = True) -> Path:
    """The folder of a run or of a sweep.

    Args:
        name: a folder; or in `root` a name, the unique beginning of one, the six signs at its end;
            `last`, `last~1` for the newest and the one before it; behind each, `/forks/NAME` for a
            fork of its session.
        root: the folder that runs are kept in.
        sweeps: does `last` count sweeps too?

    Raises:
        RunError: nothing has that name, or several have; the message lists them.
    """
    path, root = Path(name), Path(root)
    run, is_below, fork = str(name).rpartition(f"/{FORKS}/")
    if is_below and not path.is_dir():
        folder = find_place(run, root) / FORKS / fork
        if not is_run(folder):
            others = [each.name for each in forks_of(folder.parents[1])]
            hint = did_you_mean(fork, others) if others else "its session was not forked."
            raise RunError(f"The run {run} has no fork {fork!r}.", fix=hint)
        return folder
    if path.is_dir() and (is_run(path) or is_sweep(path)):
        return path
    if path.is_dir() and str(name) != "last":
        raise RunError(
            f"{path} is neither a run nor a sweep.",
            fix=f"name one of the folders in it, or list them: kit runs {path}",
        )
    known = sorted(entries(root), key=lambda folder: age(folder, begun(folder)), reverse=True)
    if last := LAST.match(str(name)):
        counted = [folder for folder in known if sweeps or not is_sweep(folder)]
        back = int(last[1] or 0)
        if back >= len(counted):
            raise RunError(
                f"There is no run {name!s}: {root} holds {len(counted)}.",
                fix="`kit runs` lists them, the newest first.",
            )
        return counted[back]
    inner = [child for folder in known if is_sweep(folder) for child in entries(folder)]
    return _by_name(str(name), [*known, *inner], root)


def _by_name(name: str, folders: Sequence[Path], root: Path) -> Path:
    exact = [folder for folder in folders if folder.name == name]
    near = exact or [f for f in folders if f.name.startswith(name) or f.name.endswith(f"-{name}")]
    if len(near) == 1:
        return near[0]
    names = [folder.name for folder in folders]
    if not near:
        hint = did_you_mean(name, names[:40]) if names else "`kit run` makes one."
        raise RunError(f"There is no run {name!r} in {root}.", fix=hint)
    listed = "\n".join(f"  {folder.name}" for folder in near[:8])
    more = f"\n  and {len(near) - 8} more" if len(near) > 8 else ""
    raise RunError(
        f"{len(near)} runs have a name that begins with {name!r}:\n{listed}{more}",
        fix="write more of it, or the six signs at its end.",
    )


def forks_of(run: Path) -> list[Path]:
    """The folders of forks of a run's session, by their names."""
    return sorted(folder for folder in entries(run / FORKS) if not is_sweep(folder))


def is_fork(folder: Path) -> bool:
    """Whether a folder is that of a fork, below its run's."""
    return folder.parent.name == FORKS and is_run(folder.parents[1])


def has_checkpoint(run: Path) -> bool:
    """Whether a run, or a fork of its session, has saved steps that it can go on from."""
    return any(run.glob(f"**/{CHECKPOINTS}/**/step-*"))


def is_run(folder: Path) -> bool:
    """Whether a folder holds at least one of a run's files, or cannot be looked into and has the
    name of one.

    Whatever has the name of such a file counts, so that a run that cannot be read is seen.
    """
    if not os.path.isdir(folder):
        return False
    if not os.access(folder, os.X_OK):
        return NAMED.match(folder.name) is not None
    return any(os.path.lexists(folder / mark) for mark in MARKS)


def is_sweep(folder: Path) -> bool:
    """Whether a folder is that of a sweep."""
    return os.path.lexists(folder / SWEEP)


def entries(root: Path) -> list[Path]:
    """The runs and sweeps in a folder."""
    try:
        return [folder for folder in root.iterdir() if is_run(folder) or is_sweep(folder)]
    except OSError:
        return []


def age(folder: Path, started: datetime | None) -> tuple[float, str]:
    """Sort key by start time; runs of the same second by name."""
    if started:
        return started.timestamp(), folder.name
    try:
        return folder.stat().st_mtime, folder.name
    except OSError:
        return 0.0, folder.name


def begun(folder: Path) -> datetime | None:
    """Start time of a run or a sweep."""
    record = read_object(folder / SWEEP) or read_object(folder / RESULT)
    named = NAMED.match(folder.name)
    return when(record.get("started"), named[1] if named else "")


def when(text: object, stamp: str) -> datetime | None:
    """Time of a record, or else of a folder's name."""
    with suppress(ValueError, OverflowError):
        return datetime.fromisoformat(str(text)).astimezone()
    with suppress(ValueError, OverflowError):
        return datetime.strptime(stamp, "%Y%m%d-%H%M%S").astimezone()
    return None


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON object; empty if the file is missing or damaged."""
    return RunFiles(file.parent).object(file.name)


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML mapping; empty if the file is missing or damaged."""
    return RunFiles(file.parent).settings(file.name)


def read_rows(path: Path) -> list[Row]:
    """Read the mappings of a JSON lines file; empty without a file.

    A last line that is still being written is left out, so a run can be read while it works.
    """
    return RunFiles(path.parent).rows(path.name)


def reward_curve(folder: Path) -> list[tuple[int, float]]:
    """(step, mean reward) of each training step that has one."""
    return RunFiles(folder).rewards()
