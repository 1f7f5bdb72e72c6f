"""The dashboard in a notebook: widgets while the kernel lives, and a picture that stays.

There are two outputs, for the reason that `kit.viz.live.frontend` gives: the widgets, and under
them the same picture as plain HTML, brought up to date now and then. At the end the widgets leave
and the picture stays.

A thread draws, at most twice a second and seldom enough to cost the steps little; the training's
own thread only says that something has changed.
"""

from __future__ import annotations

import contextvars
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

from kit.errors import SessionError
from kit.reports import TrainingStatus
from kit.utils.display import Bundle, bundle
from kit.utils.formatting import count, shorten
from kit.viz.html import page, part, style
from kit.viz.live.age import ATTACH, late, picture_of
from kit.viz.live.dashboard import (
    curves_html,
    dashboard_html,
    dashboard_plain,
    head_html,
    samples_html,
)
from kit.viz.live.frontend import (
    NOTHING,
    cell,
    let_clicks_through,
    new_name,
    show_data,
    still,
    view,
)

GO_ON = (
    "`session.dashboard()` in a new cell shows how the training goes on; after a restart of the "
    f"kernel, first find its session: {ATTACH}."
)
LATE_SECONDS = 60.0
"""After so long without a step, the dashboard says since when."""
REDRAW_SECONDS = 0.5
"""A faster redraw costs training time and no eye can follow it."""
SAMPLES_SECONDS = 4.0
"""Samples are read, so they stay long enough for that."""
PICTURE_SECONDS = 15.0
"""How old the picture in the file may be while training runs."""
SHARE = 0.02
"""Largest share of time that drawing may take."""
BUTTON_WIDTH = "7em"
_making = threading.Lock()


class Training(Protocol):
    """Protocol of what the dashboard needs of a training; `kit.Training` is one."""

    shown: Any
    """What displays it, once something does."""

    @property
    def status(self) -> TrainingStatus:
        """All that is drawn."""

    @property
    def state(self) -> str:
        """The state of `status`, which is cheaper to ask for."""

    @property
    def ended(self) -> bool:
        """Whether there will be no further step."""

    @property
    def goes_on(self) -> bool:
        """Whether it was told to run, and not to pause or stop since."""

    def watch(self, changed: Callable[[], None]) -> None:
        """Call a function after every step and every change of state."""

    def pause(self) -> None:
        """Hold after the step under way."""

    def resume(self) -> None:
        """Begin, or go on."""

    def step_once(self) -> None:
        """Do one step, then hold."""

    def stop(self) -> None:
        """End after the step under way."""


def show_training(training: Training, *, live: bool) -> None:
    """Display a training: as a dashboard with buttons, or as a picture that follows it."""
    with _making:
        if training.shown is None:
            steered = live and not training.ended
            training.shown = Dashboard(training) if steered else Follower(training)
    training.shown.show()


class Still:
    """An output that holds the picture of a training.

    Args:
        steered: there are buttons, in whose place a page without them shows how to go on.
    """

    def __init__(self, *, steered: bool) -> None:
        self.id = new_name()
        self._steered = steered

    def show(self, status: TrainingStatus) -> None:
        """Display it in this cell too."""
        show_data(self._data(status), f"kit-still-{self.id}")

    def update(self, status: TrainingStatus) -> None:
        """Redraw it, wherever it is displayed."""
        show_data(self._data(status), f"kit-still-{self.id}", update=True)

    def _data(self, status: TrainingStatus) -> Bundle:
        picture = bundle(page(dashboard_html(status)), dashboard_plain(status))
        if status.ended or not self._steered:
            return still(picture, self.id)
        return still(picture, self.id, picture_of("the training", GO_ON))


class Follower:
    """Picture without buttons, drawn by the training thread: for runs that nobody watches."""

    def __init__(self, training: Training) -> None:
        self._training, self._still = training, Still(steered=False)
        self._cells: set[str] = set()
        self._due = 0.0
        training.watch(self._changed)

    def show(self) -> None:
        """Display it, unless this cell has it already."""
        if (here := cell()) not in self._cells:
            self._cells.add(here)
            self._still.show(self._training.status)

    def _changed(self) -> None:
        if time.monotonic() < self._due and not self._training.ended:
            return
        begin = time.thread_time()
        try:
            self._still.update(self._training.status)
        except Exception as error:  # the training goes on, so that is all it may cost
            warnings.warn(f"The training cannot be drawn: {error}", RuntimeWarning, stacklevel=2)
        cost = time.thread_time() - begin
        self._due = time.monotonic() + max(PICTURE_SECONDS, cost / SHARE)


class Dashboard:
    """Widgets that follow a training and steer it."""

    def __init__(self, training: Training) -> None:
        import ipywidgets as widgets

        self.training, self._still = training, Still(steered=True)
        self.head, self.curves, self.samples = (widgets.HTML() for _ in range(3))
        self.go = self._button("Pause", self._pause_or_resume)
        self.step = self._button("One step", training.step_once)
        self.stop = self._button("Stop", training.stop)
        self.step.tooltip = "Do one step, then hold"
        self.stop.tooltip = "End the training after the step under way"
        buttons = widgets.HBox([self.go, self.step, self.stop])
        buttons.layout.margin = "0 10px"
        sheet = widgets.HTML(str(style()))
        sheet.layout.display = "none"
        self.root = widgets.VBox([sheet, self.head, buttons, self.curves, self.samples])
        self.root.add_class(f"kit-live-{self._still.id}")
        self.drawing_seconds = 0.0
        """Processor time that the thread has taken so far."""
        self._cells: set[str] = set()
        self._state_drawn = ""
        self._samples_due = self._still_due = 0.0
        self._drawing = threading.Lock()
        self._changed, self._hurry = threading.Event(), threading.Event()
        self._draw(training.status, self._state())
        training.watch(self._on_change)
        context = contextvars.copy_context()  # what it displays goes to the cell that made it
        threading.Thread(
            target=context.run, args=(self._follow,), name="kit-dashboard", daemon=True
        ).start()

    def show(self) -> None:
        """Display the widgets and the picture, unless this cell has them already."""
        if (here := cell()) in self._cells:
            return
        self._cells.add(here)
        data = NOTHING if self.training.ended else view(self.root)
        show_data(data, f"kit-widgets-{self._still.id}")
        self._still.show(self.training.status)

    # ---- what the buttons do -------------------------------------------------------------------

    def _button(self, words: str, press: Callable[[], None]) -> Any:
        from ipywidgets import Button, Layout

        button = Button(description=words, layout=Layout(width=BUTTON_WIDTH))

        def pressed(_: object) -> None:
            with suppress(SessionError):  # it may have ended between the look and the click
                press()

        button.on_click(pressed)
        return button

    def _pause_or_resume(self) -> None:
        (self.training.pause if self.training.goes_on else self.training.resume)()

    # ---- drawing -------------------------------------------------------------------------------

    def _on_change(self) -> None:
        """Note a change of the training, from its thread; a change of state is drawn at once."""
        self._changed.set()
        if self._state() != self._state_drawn:
            self._hurry.set()

    def _state(self) -> str:
        return f"{self.training.state} {self.training.goes_on}"

    def _follow(self) -> None:
        """Draw until the training has ended; resting long enough to keep to its share."""
        while True:
            self._changed.wait()
            self._changed.clear()
            # What changes after this look asks for another one, so it comes first.
            state, begin = self._state(), time.thread_time()
            status = self.training.status
            try:
                self._draw(status, state)
            except Exception as error:  # the training goes on, so that is all it may cost
                words = f"✗ The dashboard cannot be drawn: {type(error).__name__}: {error}"
                self.head.value = part(shorten(words, 500))
            cost = time.thread_time() - begin
            self.drawing_seconds += cost
            if status.ended:
                self._leave(status)
                return
            self._hurry.wait(max(REDRAW_SECONDS, cost / SHARE))
            self._hurry.clear()

    def _draw(self, status: TrainingStatus, state: str) -> None:
        self._state_drawn = state
        goes_on, now = self.training.goes_on, time.monotonic()
        begun = status.state != "ready" or bool(status.asked)
        self.go.description, self.go.tooltip = _what_it_does(status, goes_on, begun)
        self.go.layout.width = "auto" if not begun else BUTTON_WIDTH
        self.step.disabled, self.stop.disabled = goes_on, not begun
        let_clicks_through(self.go, self.step, self.stop)
        silent = late(LATE_SECONDS, f"A step may take long. If the kernel has ended: {GO_ON}")
        running = status.state == "running"
        self.head.value = part(head_html(status), silent if running else None)
        self.curves.value = part(curves_html(status))
        if now >= self._samples_due or not goes_on:
            self._samples_due = now + SAMPLES_SECONDS
            self.samples.value = part(samples_html(status.last))
        if self._cells and (now >= self._still_due or not goes_on):
            self._still_due = now + PICTURE_SECONDS
            self._still.update(status)

    def _leave(self, status: TrainingStatus) -> None:
        """Close the widgets; the picture under them is up to date and stays."""
        self._still.update(status)
        show_data(NOTHING, f"kit-widgets-{self._still.id}", update=True)
        for widget in (self.root, *self.root.children, self.go, self.step, self.stop):
            widget.close()


def _what_it_does(status: TrainingStatus, goes_on: bool, begun: bool) -> tuple[str, str]:
    """Words on the first button, and its tooltip."""
    if goes_on:
        return "Pause", "Hold after the step under way"
    if begun:
        return "Resume", "Go on with the training"
    if not status.step:
        return f"Train {count(status.total, 'step')}", "Begin the training"
    words = f"Train {count(status.total, 'more step')}"
    return words, f"Train on from the weights of now, which have {count(status.step, 'step')}"
