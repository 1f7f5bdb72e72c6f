"""`run_notebook`: one notebook, executed into a folder of its own, with everything it left.

`run_notebooks` runs several over one stack, which may stay warm for a later call.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml
from rich.console import Console

from kit.errors import RunError, did_you_mean
from kit.reports.runs import Lineage, Process, RunRecord, RunSettings, WhatFailed, held_out
from kit.runs import result as run_result
from kit.runs.kernel import execute
from kit.runs.overrides import for_notebook
from kit.runs.page import write_page
from kit.runs.parameters import check_parameters, open_notebook, read_parameters
from kit.runs.progress import RunProgress, say
from kit.tracking.recorder import GROUP_VARIABLE, NAME_VARIABLE, current_group
from kit.tracking.run_folder import (
    ATTEMPTS,
    NOTEBOOK,
    PARAMETERS,
    RUNS,
    has_checkpoint,
    new_folder,
    new_name,
)
from kit.utils.files import replace_file
from kit.utils.reading import read_text
from kit.utils.versions import versions

Ending = Literal["completed", "failed", "interrupted"]


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended; the same is in its `result.json`."""

    folder: Path
    status: Ending
    headline: dict[str, Any]
    """As `RunRecord.headline`; None for what was not measured."""
    seconds: float
    error: WhatFailed | None = None

    @property
    def notebook(self) -> Path:
        """The executed notebook."""
        return self.folder / NOTEBOOK


def run_notebook(
    path: str | Path,
    parameters: Mapping[str, object] | None = None,
    *,
    out_root: str | Path = RUNS,
    console: Console | None = None,
    settings: RunSettings | None = None,
) -> RunResult:
    """Execute a notebook from top to bottom, and keep all it did in a new folder.

    Args:
        path: the notebook.
        parameters: new values for its parameters: text, read as each parameter's type, or values
            of that type.
        out_root: the folder that runs are kept in.
        console: where progress and summary are shown; None takes standard output.
        settings: seed, preset, and what is kept; None takes the defaults.

    Returns:
        The result. A notebook that failed is a result too: `status` is "failed", `error` says why.

    Raises:
        RunError: before anything starts: no such notebook or parameter, or a wrong value.
        KeyboardInterrupt: the run was stopped; what it did so far is in its folder.
    """
    source, console = Path(path), console or Console()
    known = read_parameters(source)
    given, settings = for_notebook(source, known, parameters or {}, settings or RunSettings())
    values = check_parameters(source, known, given)
    name = os.environ.pop(NAME_VARIABLE, "") or new_name(source.stem)
    folder = new_folder(Path(out_root), name)
    record = RunRecord(
        status="running",
        notebook=str(source),
        directory=str(source.resolve().parent),
        parameters={name: values.get(name, p.value) for name, p in known.items()},
        given=values,
        settings=settings.model_copy(update={"folder": str(folder)}),
        versions=versions(),
        git_commit=run_result.git_commit(source.resolve().parent),
        machine=run_result.machine(),
        started=datetime.now().astimezone().isoformat(timespec="seconds"),
        process=Process.me(),
    )
    record.write(folder)
    text = yaml.safe_dump(record.parameters, sort_keys=False, allow_unicode=True)
    replace_file(folder / PARAMETERS, text)
    replace_file(folder / NOTEBOOK, read_text(source))  # to resume it from
    say(console, f"Running {source} in {folder}")
    return carry_out(folder, source.resolve(), record, console)


def carry_out(folder: Path, source: Path, record: RunRecord, console: Console) -> RunResult:
    """Execute a notebook, and record how it ended, whatever happens.

    Args:
        folder: the run's, with its record in it.
        source: the notebook.
        record: everything in it is checked.
        console: where progress and summary are shown.
    """
    cells = sum(cell.cell_type == "code" for cell in open_notebook(source).cells)
    cells += bool(record.given)  # they are a cell of their own
    clock = time.monotonic()
    status: Ending = "interrupted"
    error: WhatFailed | None = None
    try:
        with RunProgress(console, folder, cells, record.parameters) as progress:
            error = execute(
                source,
                folder / NOTEBOOK,
                record.given,
                progress.cell,
                Path(record.directory),
                record.settings,
            )
        status = "failed" if error else "completed"
    finally:
        seconds = time.monotonic() - clock
        result = RunResult(folder, status, run_result.headline(folder), seconds, error)
        _keep(result, record)
        _draw(result, console)
        _summarize(result, console)
    return result


def _keep(result: RunResult, record: RunRecord) -> None:
    lineage = Lineage(
        attempts=record.lineage.attempts, continued=run_result.continued(result.folder)
    )
    ended = record.model_copy(
        update={
            "status": result.status,
            "headline": result.headline,
            "seed": run_result.seed(result.folder),
            "seconds": round(result.seconds, 2),
            "lineage": lineage,
            "process": None,
            "error": result.error,
        }
    )
    ended.write(result.folder)
    if result.status == "completed":  # what attempts before this one wrote is in its files
        shutil.rmtree(result.folder / ATTEMPTS, ignore_errors=True)


def _draw(result: RunResult, console: Console) -> None:
    """Make the page and the picture. The run stands without them, so a failure is only told."""
    jobs: list[tuple[Callable[[Path], object], Path]] = [
        (run_result.draw_reward_curve, result.folder)
    ]
    if result.notebook.is_file():  # an interrupt can come before the kernel is up
        jobs.append((write_page, result.notebook))
    for draw, argument in jobs:
        try:
            draw(argument)
        except Exception as error:
            words = f"{draw.__name__} failed, and its file is missing: {error}"
            say(console, words, "yellow")


def _summarize(result: RunResult, console: Console) -> None:
    numbers = result.headline
    name, moved = held_out(
        (numbers["accuracy_before"], numbers["accuracy_after"]),
        (numbers["mean_reward_before"], numbers["mean_reward_after"]),
    )
    if moved:
        words = f"{name.capitalize()} on {numbers['dataset']}, before and after: {moved}"
        say(console, words, "bold")
    curve = run_result.text_curve(result.folder)
    if curve:
        say(console, curve)
    if result.error:
        where = f"Cell {result.error.cell}" if result.error.cell else "The notebook"
        say(console, f"{where} failed: {result.error.name}: {result.error.message}", "bold red")
    say(console, f"{result.status.capitalize()} after {result.seconds:.0f} s. Everything is in")
    say(console, f"  {result.folder}")
    for file in sorted(result.folder.iterdir()):
        say(console, f"    {file.name}{'/' if file.is_dir() else ''}")
    if (result.folder / "notebook.html").is_file():
        say(console, "Read it in a browser: notebook.html. Step through it yourself: make lab.")
    if result.status != "completed":
        saved = has_checkpoint(result.folder)
        words = "Go on from its last checkpoint" if saved else "It has no checkpoint; run it anew"
        say(console, f"{words}: kit run --resume {result.folder}")


def run_notebooks(
    paths: Sequence[str | Path],
    parameters: Mapping[str, object] | None = None,
    *,
    out_root: str | Path = RUNS,
    console: Console | None = None,
    settings: RunSettings | None = None,
) -> list[RunResult]:
    """Execute notebooks one after the other, each into a folder of its own; see `run_notebook`.

    A notebook whose engine settings are those of the one before begins its stack anew instead of
    starting processes. One that fails does not keep the others from running. At the end nothing is
    left, whatever happens, but for a stack that `settings.keep_warm` leaves for some minutes.

    Args:
        paths: the notebooks.
        parameters: new values; each notebook is given those that it takes.
        out_root: the folder that runs are kept in.
        console: where progress and summaries are shown; None takes standard output.
        settings: seed, preset, and what is kept; None takes the defaults.

    Raises:
        RunError: before anything starts: no such notebook, a parameter that none of them takes, or
            a wrong value.
    """
    sources, settings = [Path(path) for path in paths], settings or RunSettings()
    console = console or Console()
    shares = _shares(sources, parameters or {}, settings)
    with one_stack(settings.keep_warm, console, alone=len(sources) < 2):
        return [
            run_notebook(source, share, out_root=out_root, console=console, settings=settings)
            for source, share in zip(sources, shares, strict=True)
        ]


def _shares(
    sources: Sequence[Path], parameters: Mapping[str, object], settings: RunSettings
) -> list[dict[str, object]]:
    """Parameters of each notebook, all checked before the first one runs."""
    known = [read_parameters(source) for source in sources]
    names = {name for each in known for name in each}
    unknown = [name for name in parameters if name not in names]
    if unknown and len(sources) > 1:
        raise RunError(
            f"None of the notebooks has a parameter {unknown[0]!r}.",
            fix=did_you_mean(unknown[0], names) if names else f"leave {unknown[0]!r} out.",
        )
    shares = []
    for source, each in zip(sources, known, strict=True):
        share = {n: value for n, value in parameters.items() if n in each or len(sources) == 1}
        check_parameters(source, each, for_notebook(source, each, share, settings)[0])
        shares.append(share)
    return shares


@contextmanager
def one_stack(keep_warm: float, console: Console, *, alone: bool = True) -> Iterator[None]:
    """Have kernels that start inside the block leave their stack to the next one.

    Args:
        keep_warm: minutes that the last one waits for a later call. An interrupt ends it at once.
        console: where it is told that it waits.
        alone: only one notebook runs.
    """
    from kit.cluster import registry

    if current_group() or (alone and not keep_warm):  # a group's stacks are its maker's to end
        yield
        return
    group = os.environ[GROUP_VARIABLE] = secrets.token_hex(8)
    leave = False
    try:
        yield
        leave = keep_warm > 0
    finally:
        del os.environ[GROUP_VARIABLE]
        for entry in registry.living():
            if entry.group == group and not leave:
                registry.terminate(entry)
            elif entry.group == group:
                say(
                    console,
                    f"Its stack stays warm for {keep_warm:g} minutes, for the next run; "
                    f"end it sooner: kit doctor --stop {entry.name}",
                )
