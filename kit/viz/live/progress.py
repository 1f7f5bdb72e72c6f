"""Lines that are redrawn in a notebook or a terminal: a training's progress, a session's start."""

from __future__ import annotations

import contextvars
import shutil
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Protocol, Self

from kit.reports import REWARD, StepReport
from kit.tracking.catalog import short_name
from kit.utils.display import Bundle, bundle
from kit.utils.formatting import duration, one_line
from kit.viz.html import join, tag
from kit.viz.live.age import ATTACH, late
from kit.viz.live.frontend import NOTHING, frontend, new_name, show_data

REDRAW_SECONDS = 0.5
"""A faster redraw costs training time and no eye can follow it."""


LATE_SECONDS = 60.0
"""After so long without a step, the line says since when."""
GO_ON = (
    "A step may take long. If the kernel has ended, find the session with its finished steps: "
    f"{ATTACH}."
)


class _Line:
    """A line that is redrawn where it stands, in a notebook or a terminal."""

    def __init__(self) -> None:
        self.where = frontend()
        self._shown_as = ""

    def draw(self, picture: Bundle, end: str = "") -> None:
        """Redraw it; `end` is written after it in a terminal."""
        if self.where == "terminal":
            room = shutil.get_terminal_size().columns - 1
            line = picture["text/plain"][:room]
            print(f"\r\033[K{line}", end=end, file=sys.stderr, flush=True)
        elif self._shown_as:
            show_data(picture, self._shown_as, update=True)
        else:
            name = new_name()
            show_data(picture, name)
            self._shown_as = name


class Progress:
    """Shows step, reward and time left. In a saved notebook its last state remains."""

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        self.total = total
        self.begin = time.perf_counter()
        self.drawn = -1.0
        self.line = ""
        self.done = 0
        self._ended = False
        self._line = _Line()
        self.enabled = enabled and (self._line.where != "terminal" or sys.stderr.isatty())

    def __enter__(self) -> Self:
        if self.enabled and self._line.where != "terminal":
            self._line.draw(self.picture())
        return self

    def update(self, report: StepReport) -> None:
        """One more step is done."""
        self.done += 1
        seconds = time.perf_counter() - self.begin
        left = seconds / self.done * (self.total - self.done)
        reward = report.metrics.get(REWARD, float("nan"))
        length = report.metrics.get("rollout/response_len/mean", float("nan"))
        self.line = (
            f"step {self.done}/{self.total}   reward {reward:.3f}   length {length:.1f}   "
            f"{seconds / self.done:.2f} s a step   {left:.0f} s left"
        )
        if speed := report.metrics.get("perf/tokens_per_gpu_per_sec"):
            self.line += f"   {speed:,.0f} tokens/s"
        if report.trends:
            self.line += f"   ! look at {', '.join(short_name(name) for name in report.trends)}"
        if self.enabled and seconds - self.drawn >= REDRAW_SECONDS:
            self.drawn = seconds
            self._line.draw(self.picture())

    def __exit__(self, *_: object) -> None:
        self._ended = True
        if self.enabled and (self.done or self._line.where != "terminal"):
            self._line.draw(self.picture(), end="\n")

    def picture(self) -> Bundle:
        """What a notebook stores of it at this moment."""
        done, total = str(self.done), str(self.total)
        bar = tag("progress", value=done, max=total, style="width:16em")
        line = tag("div", bar, f" {self.line}", style="font-family:monospace")
        silent = None if self._ended else late(LATE_SECONDS, GO_ON)
        return {"text/html": str(join(line, silent)), "text/plain": self.line}


PATIENCE = 3.0
"""A start that takes fewer seconds shows nothing."""
POLL_SECONDS = 0.2
START_LATE_SECONDS = 20.0
"""The line of a start counts seconds; after so many without a redraw it says since when."""
SIDES = ("engine", "trainer")


class Stage(Protocol):
    """What one side of the stack does while it starts; `kit.cluster.progress.Stage` is one."""

    @property
    def words(self) -> str:
        """What it does, such as `loading weights`."""

    @property
    def since(self) -> float:
        """When it began, in seconds of `time.monotonic()`."""

    @property
    def ready(self) -> bool:
        """Whether it has nothing left to do."""


class Starting:
    """Shows the stages of engine and trainer side by side while the block runs.

    In a notebook and in a terminal one quiet line stays, with the time that it took; after an error
    none does. Where nobody watches, as in a batch run, nothing is shown.

    Args:
        stages: tells the stages of `engine` and `trainer`, as far as they are known.
        ray: tells whether Ray's head is up.
    """

    def __init__(self, stages: Callable[[], Mapping[str, Stage]], ray: Callable[[], bool]) -> None:
        self._stages, self._ray = stages, ray
        self.begin = time.monotonic()
        self.line = ""
        """What is shown now; empty before the first time."""
        self._line = _Line()
        where = self._line.where
        self._watched = where == "live" or (where == "terminal" and sys.stderr.isatty())
        self._ended = threading.Event()
        context = contextvars.copy_context()  # what it displays goes to the cell that starts
        self._thread = threading.Thread(
            target=context.run, args=(self._follow,), name="kit-starting", daemon=True
        )

    def __enter__(self) -> Self:
        if self._watched:
            self._thread.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._watched:
            return
        self._ended.set()
        self._thread.join()
        if self.line:
            done = "" if error else done_line(self.begin, self._stages(), time.monotonic())
            self._draw(done, end="\n" if done else "")

    def _follow(self) -> None:
        wait = PATIENCE
        while not self._ended.wait(wait):
            wait = POLL_SECONDS
            line = under_way(self.begin, self._stages(), time.monotonic(), ray=self._ray())
            if line != self.line:
                self._draw(line)

    def _draw(self, line: str, end: str = "") -> None:
        self.line = line
        with suppress(Exception):  # the start goes on where its line cannot be shown
            self._line.draw(shown(line, ended=bool(end) or not line), end)


def under_way(begin: float, stages: Mapping[str, Stage], now: float, *, ray: bool) -> str:
    """`starting 23 s · engine: loading weights 12 s · trainer: ready`.

    Args:
        begin: of the start, in seconds of `time.monotonic()`, as are all times here.
        stages: what the processes have told.
        now: the time.
        ray: is Ray's head up?
    """
    parts = [f"starting {max(now - begin, 0):.0f} s"]
    if not ray:
        return f"{parts[0]} · Ray"
    for side in SIDES:
        stage = stages.get(side)
        if stage is None:
            parts.append(f"{side}: process, imports")
        elif stage.ready:
            parts.append(f"{side}: ready")
        else:
            parts.append(f"{side}: {one_line(stage.words)} {max(now - stage.since, 0):.0f} s")
    return " · ".join(parts)


def done_line(begin: float, stages: Mapping[str, Stage], now: float) -> str:
    """`Started in 41.3 s: engine after 38.0 s, trainer after 41.0 s`, and a full stop."""
    ready = [
        f"{side} after {duration(max(stages[side].since - begin, 0))}"
        for side in SIDES
        if side in stages and stages[side].ready
    ]
    return f"Started in {duration(max(now - begin, 0))}{': ' if ready else ''}{', '.join(ready)}."


def shown(line: str, *, ended: bool = False) -> Bundle:
    """What a notebook stores of a line; one that moves says later that it moves no more."""
    if not line:
        return NOTHING
    silent = None if ended else late(START_LATE_SECONDS, "If the kernel has ended, run this again.")
    return bundle(join(tag("div", line, style="font-family:monospace"), silent), line)
