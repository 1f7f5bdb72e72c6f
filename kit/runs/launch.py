"""`run_notebook`: one notebook, executed into a folder of its own, with everything it left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from kit.errors import RunError
from kit.runs import outcome
from kit.runs.kernel import Failure, execute
from kit.runs.page import write_page
from kit.runs.parameters import Parameter, check_parameters, open_notebook, read_parameters
from kit.runs.progress import RunProgress

RUNS = Path("papermill_runs")
NOTEBOOK = "notebook.ipynb"

Ending = Literal["completed", "failed", "interrupted"]

_STEP_PARAMETERS = ("steps", "num_rollout")
"""Notebooks that train name the number of steps so; it tells the progress bar where the end is."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended; the same is in its `result.json`."""

    folder: Path
    status: Ending
    headline: dict[str, Any]
    """steps, reward_first, reward_last, dataset, accuracy_before, accuracy_after; None for what
    was not measured."""
    seconds: float
    error: Failure | None = None

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
) -> RunResult:
    """Execute a notebook from top to bottom, and keep all it did in a new folder.

    Args:
        path: the notebook.
        parameters: new values for its parameters: text, read as each parameter's type, or values
            of that type.
        out_root: the folder that runs are kept in.
        console: where progress and summary are shown; None takes standard output.

    Returns:
        The result. A notebook that failed is a result too: `status` is "failed", `error` says why.

    Raises:
        RunError: before anything starts: no such notebook or parameter, or a wrong value.
        KeyboardInterrupt: the run was stopped; what it did so far is in its folder.
    """
    source, console = Path(path), console or Console()
    known = read_parameters(source)
    values = check_parameters(source, known, parameters or {})
    cells = sum(cell.cell_type == "code" for cell in open_notebook(source).cells)
    started = datetime.now().astimezone()
    folder = _new_folder(Path(out_root), f"{started:%Y%m%d-%H%M%S}-{source.stem}")
    console.print(f"Running {source} in {folder}", markup=False, highlight=False, soft_wrap=True)

    clock = time.monotonic()
    status: Ending = "interrupted"
    error: Failure | None = None
    try:
        with RunProgress(console, folder, cells + bool(values), _steps(known, values)) as progress:
            error = execute(source, folder / NOTEBOOK, values, progress.cell)
        status = "failed" if error else "completed"
    finally:
        result = RunResult(
            folder, status, outcome.headline(folder), time.monotonic() - clock, error
        )
        _keep(result, source, known, values, started)
        _draw(result, console)
        _summarize(result, console)
    return result


def _new_folder(root: Path, name: str) -> Path:
    """Make `root/name`, with a number behind it where another run has taken that."""
    number = 1
    while True:
        folder = root / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            number += 1
        except OSError as error:
            raise RunError(
                f"The run's folder {folder} cannot be made.",
                why=str(error),
                fix="choose another place with --out.",
            ) from None
        else:
            return folder.resolve()


def _steps(known: Mapping[str, Parameter], values: Mapping[str, Any]) -> int | None:
    for name in _STEP_PARAMETERS:
        value = values.get(name, known[name].value if name in known else None)
        if isinstance(value, int):
            return value
    return None


def _keep(
    result: RunResult,
    source: Path,
    known: Mapping[str, Parameter],
    values: Mapping[str, Any],
    started: datetime,
) -> None:
    outcome.write_result(
        result.folder,
        {
            "status": result.status,
            "notebook": str(source),
            "parameters": {name: values.get(name, p.value) for name, p in known.items()},
            "headline": result.headline,
            "seed": outcome.seed(result.folder),
            "versions": outcome.versions(),
            "git_commit": outcome.git_commit(source.resolve().parent),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round(result.seconds, 2),
            "error": asdict(result.error) if result.error else None,
        },
    )


def _draw(result: RunResult, console: Console) -> None:
    """Make the page and the picture. The run stands without them, so a failure is only told."""
    jobs: list[tuple[Callable[[Path], object], Path]] = [(outcome.draw_reward_curve, result.folder)]
    if result.notebook.is_file():  # an interrupt can come before the kernel is up
        jobs.append((write_page, result.notebook))
    for draw, argument in jobs:
        try:
            draw(argument)
        except Exception as error:
            words = f"{draw.__name__} failed, and its file is missing: {error}"
            console.print(words, markup=False, style="yellow")


def _summarize(result: RunResult, console: Console) -> None:
    def say(text: str, style: str = "") -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    numbers = result.headline
    before, after = numbers["accuracy_before"], numbers["accuracy_after"]
    if before is not None and after is not None:
        say(f"Accuracy on {numbers['dataset']}: {before:.1%} before, {after:.1%} after", "bold")
    curve = outcome.text_curve(result.folder)
    if curve:
        say(curve)
    if result.error:
        where = f"Cell {result.error.cell}" if result.error.cell else "The notebook"
        say(f"{where} failed: {result.error.name}: {result.error.message}", "bold red")
    say(f"{result.status.capitalize()} after {result.seconds:.0f} s. Everything is in")
    say(f"  {result.folder}")
    for file in sorted(result.folder.iterdir()):
        say(f"    {file.name}{'/' if file.is_dir() else ''}")
    if (result.folder / "notebook.html").is_file():
        say("Read it in a browser: notebook.html. Step through it yourself: make lab.")
