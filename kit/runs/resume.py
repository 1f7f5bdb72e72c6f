"""`resume_notebook`: a run that was killed, interrupted or failed, taken to its end.

It runs what was recorded: the notebook's cells as they were in the run's own copy, with the same
parameters and settings, in the notebook's own folder, by the Python that resumes it. What its
kernel does then is in `kit.lifecycle.resume`.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import psutil
from rich.console import Console

from kit.config.changes import full_names
from kit.errors import RunError
from kit.reports.runs import Attempt, Process, RunRecord, RunSettings, read_record
from kit.runs import result
from kit.runs.execute import RunResult, carry_out
from kit.runs.parameters import open_notebook
from kit.runs.progress import say
from kit.tracking.recorder import LINES, RUN_DIR_VARIABLE
from kit.tracking.run_folder import (
    ATTEMPTS,
    CHECKPOINTS,
    NOTEBOOK,
    RUNS,
    find_run,
    has_checkpoint,
)
from kit.utils.files import replace_file
from kit.utils.versions import versions

SOURCE = "source.ipynb"
"""In `attempts/`: the notebook as it was before the first attempt."""
_ADDED = ("injected-parameters", "papermill-error-cell-tag")
ORPHAN_SECONDS = 30.0
"""How long the kernel of a killed run may take to see that it is alone."""


def resume_notebook(
    run: str | Path,
    *,
    out_root: str | Path = RUNS,
    console: Console | None = None,
    keep_warm: float = 0.0,
    changes: Mapping[str, Any] | None = None,
) -> RunResult:
    """Take a run to its end, from the last checkpoint of the training that it was at.

    Args:
        run: its folder; or, in `out_root`, its name or `last`; see `find_run`.
        out_root: the folder that runs are kept in.
        console: where progress and summary are shown; None takes standard output.
        keep_warm: minutes that the stack waits for the next run.
        changes: settings to continue with, by their full names: `{"training.learning_rate": 1e-5}`.
            They change where the first training continues, and stay for later attempts.

    Raises:
        RunError: there is no such run, it is still running, or it is completed.
        ConfigError: a setting that cannot change while a session runs.
        KeyboardInterrupt: the run was stopped; it can be resumed again.
    """
    console = console or Console()
    folder = find_run(run, out_root)
    record = read_record(folder)
    _refuse(folder, record)
    source = _source(folder, record)
    now = versions()
    changed = [
        f"{name} was {before}, is {now.get(name)}"
        for name, before in record.versions.items()
        if now.get(name) != before
    ]
    if changed:
        words = f"Other versions than the run began with ({'; '.join(changed)})"
        say(console, f"{words}: numbers may differ.", "yellow")
    record = _begin(folder, record, keep_warm, full_names(changes or {}))
    if has_checkpoint(folder):
        where = "its trainings go on from their newest checkpoints"
    else:
        where = "it has no checkpoint and begins again: step 0"
    say(console, f"Resuming {record.notebook} in {folder}: {where}.")
    return carry_out(folder, source, record, console)


def _refuse(folder: Path, record: RunRecord) -> None:
    if record.status == "completed":
        raise RunError(
            f"The run {folder.name} is completed.", fix=f"start it anew: kit run {record.notebook}."
        )
    if record.status == "running" and record.process and record.process.lives:
        raise RunError(
            f"The run {folder.name} is still running: process {record.process.pid} on "
            f"{record.process.host}.",
            fix="wait for its end, or interrupt it first; if that machine is gone, set `status` to "
            "interrupted in its result.json.",
        )
    orphans = _orphans(folder)
    _, alive = psutil.wait_procs(orphans, timeout=ORPHAN_SECONDS)
    if alive:
        raise RunError(
            f"The kernel of the run {folder.name} still works: process {alive[0].pid}.",
            why="Its `kit run` is gone, and two kernels would write into one folder.",
            fix=f"end it (`kill {alive[0].pid}`), and resume again.",
        )
    if not Path(record.directory).is_dir():
        raise RunError(
            f"The folder {record.directory}, in which the notebook worked, is gone.",
            fix=f"put it back, or write its new place into {folder / 'result.json'}.",
        )


def _orphans(folder: Path) -> list[psutil.Process]:
    """Kernels of this run that outlived their `kit run`. Sessions' processes end by themselves."""
    found = []
    for process in psutil.process_iter():
        try:
            words = process.cmdline()
            kernel = "ipykernel_launcher" in " ".join(words[:4])
            if kernel and process.environ().get(RUN_DIR_VARIABLE) == str(folder):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _source(folder: Path, record: RunRecord) -> Path:
    """The notebook as it was when the run began: its own copy, without what was added to it."""
    kept = folder / ATTEMPTS / SOURCE
    if kept.is_file():
        return kept
    notebook = open_notebook(folder / NOTEBOOK)
    notebook.cells = [
        cell for cell in notebook.cells if not set(cell.metadata.get("tags", [])) & {*_ADDED}
    ]
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    kept.parent.mkdir(exist_ok=True)
    return replace_file(kept, nbformat.writes(notebook))


def _begin(
    folder: Path, record: RunRecord, keep_warm: float, changes: Mapping[str, Any]
) -> RunRecord:
    """Move what earlier attempts wrote aside, and record a new attempt."""
    before = record.settings.attempt
    aside = folder / ATTEMPTS / str(before)
    for file in sorted(folder.rglob("*")):
        inner = file.relative_to(folder)
        if inner.parts[0] == ATTEMPTS or CHECKPOINTS in inner.parts or not _is_record(file):
            continue
        (aside / inner).parent.mkdir(parents=True, exist_ok=True)
        file.replace(aside / inner)
    status = "killed" if record.status == "running" else record.status
    lineage = record.lineage.model_copy(deep=True)
    lineage.attempts.append(
        Attempt(started=record.started, status=status, seconds=record.seconds or None)
    )
    changed = {
        "attempt": before + 1,
        "folder": str(folder),
        "keep_warm": keep_warm,
        "changes": record.settings.changes | dict(changes),
    }
    begun = record.model_copy(
        update={
            "status": "running",
            "settings": RunSettings(**record.settings.model_dump() | changed),
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "seconds": 0.0,
            "versions": versions(),
            "machine": result.machine(),
            "process": Process.me(),
            "lineage": lineage,
            "error": None,
        }
    )
    begun.write(folder)
    return begun


def _is_record(file: Path) -> bool:
    """Whether a file is one that a session writes while it works."""
    return file.is_file() and (
        file.name in LINES or (file.name.startswith("config") and file.suffix == ".yaml")
    )
