"""Progress of a run in a terminal: cells done, training step, reward, time left."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from kit.reports import REWARD
from kit.runs.parameters import STEPS
from kit.tracking.run_files import Row, RunFiles
from kit.utils.formatting import duration, one_line, visible

POLL_SECONDS = 0.5
STEP_TIME = "perf/step_time"
PACE = 20
"""Steps that the time left is reckoned from, where lines are written."""
SPEED_SECONDS = 600.0
"""The time left follows from the steps of the last ten minutes, since a step can take one."""


class _TimeLeft(TimeRemainingColumn):
    """The time left for steps; cells take such different times that theirs means nothing."""

    def render(self, task: Task) -> Text:
        if task.finished or not task.fields["steady"]:
            return Text()
        return Text("left ").append_text(super().render(task))


class RunProgress:
    """Follows a run: told of each cell, it finds the training steps in the run's own files.

    In a terminal it draws two bars. Where output goes to a file it writes a line for each cell and
    about ten lines for a whole training.

    Args:
        console: where to show it.
        folder: the run's folder.
        cells: how many code cells will run.
        parameters: the notebook's; where they do not say how many steps are planned, the session's
            settings do.
    """

    def __init__(
        self, console: Console, folder: Path, cells: int, parameters: Mapping[str, Any]
    ) -> None:
        self._console, self._folder, self._cells = console, folder, cells
        self._parameters = parameters
        self._started = self._seen = 0
        self._done = threading.Event()
        self._follower = threading.Thread(target=self._follow, name="run-progress", daemon=True)
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            _TimeLeft(),
            console=console,
            speed_estimate_period=SPEED_SECONDS,
            transient=True,
            disable=not console.is_terminal,
        )
        self._cell_bar = self._bars.add_task("cells", total=cells, note="", steady=False)
        self._step_bar: TaskID | None = None

    def __enter__(self) -> Self:
        self._bars.start()
        self._follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._follower.join()
        self._bars.stop()

    def cell(self, source: str) -> None:
        """Note that a code cell starts."""
        lines = (line.strip() for line in source.splitlines())
        first = next((line for line in lines if line and not line.startswith("#")), "")
        first = one_line(first[:48])
        self._bars.update(self._cell_bar, completed=self._started, note=escape(first))
        self._started += 1
        if not self._console.is_terminal:
            say(self._console, f"cell {self._started}/{self._cells}: {first}")

    def _follow(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            self._look()
        self._look()

    def _look(self) -> None:
        rows = RunFiles(self._folder).metrics()
        if len(rows) > self._seen:
            self._show(rows)
            self._seen = len(rows)

    def _show(self, rows: list[Row]) -> None:
        total = max(planned_steps(self._folder, self._parameters) or 0, len(rows))
        reward = rows[-1].get(REWARD)
        note = "" if reward is None else f"reward {reward:.3f}"
        if self._step_bar is None:
            self._step_bar = self._bars.add_task("steps", total=total, note=note, steady=True)
        self._bars.update(self._step_bar, completed=len(rows), total=total, note=note)
        stride = max(1, total // 10)
        if not self._console.is_terminal and len(rows) // stride > self._seen // stride:
            say(self._console, f"step {len(rows)}/{total} {note}{_left(rows, total)}")


def say(console: Console, text: str, style: str = "") -> None:
    """Print a line, however wide the terminal is; what a terminal would obey is made visible."""
    console.print(visible(text), style=style, markup=False, highlight=False, soft_wrap=True)


def planned_steps(folder: Path, parameters: Mapping[str, Any]) -> int | None:
    """Steps that a run plans, by its parameters or the settings of its session, if it has one."""
    for name in STEPS:
        if isinstance(parameters.get(name), int):
            return int(parameters[name])
    training = RunFiles(folder).settings().get("training")
    planned = training.get("num_rollout") if isinstance(training, dict) else None
    return planned if isinstance(planned, int) else None


def _left(rows: list[Row], total: int) -> str:
    """Time left at the recent pace."""
    paces = [row[STEP_TIME] for row in rows[-PACE:] if row.get(STEP_TIME) is not None]
    if not paces or len(rows) >= total:
        return ""
    return f", {duration(sum(paces) / len(paces) * (total - len(rows)))} left"
