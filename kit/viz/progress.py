"""A line that moves while training runs: in a notebook's output, or in a terminal."""

from __future__ import annotations

import sys
import time
from html import escape
from types import TracebackType
from typing import Any, Self

from kit.reports import REWARD, StepReport
from kit.viz.frontend import frontend

REDRAW_SECONDS = 0.5
"""A faster redraw costs training time and no eye can follow it."""


class Progress:
    """Shows step, reward and time left. In a saved notebook its last state remains."""

    def __init__(self, total: int, *, enabled: bool = True) -> None:
        self.total, self.enabled = total, enabled
        self.begin = time.perf_counter()
        self.drawn = -1.0
        self.line = ""
        self.done = 0
        self.handle: Any = None

    def __enter__(self) -> Self:
        if self.enabled and frontend() != "terminal":
            from IPython.display import display

            show: Any = display
            self.handle = show(self._data(), raw=True, display_id=True)
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
        if self.enabled and seconds - self.drawn >= REDRAW_SECONDS:
            self.drawn = seconds
            self._draw()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.enabled and self.done:
            self._draw(end="\n")

    def _draw(self, end: str = "") -> None:
        if self.handle is not None:
            self.handle.update(self._data(), raw=True)
        elif sys.stderr.isatty():
            print(f"\r\033[K{self.line}", end=end, file=sys.stderr, flush=True)

    def _data(self) -> dict[str, str]:
        bar = f'<progress value="{self.done}" max="{self.total}" style="width:16em"></progress>'
        html = f'<div style="font-family:monospace">{bar} {escape(self.line)}</div>'
        return {"text/html": html, "text/plain": self.line}
