"""`Training`: a loop of `session.step()`, in the caller's thread or in one of its own.

    ready ──resume──► running ──pause──► paused ──resume──► running ──► finished
                         │                 │ step_once: one step, paused again
                         └──stop, until────┴──────────────────────────► stopped
                         └──an exception──────────────────────────────► failed

Whatever is asked for takes effect between two steps, so what a paused training leaves behind is a
session in order. `run` is the loop that `session.train` is; `resume` starts the same loop in a
thread, which leaves the notebook free. Where the loop runs, and who sees it:

where             without dashboard              with it
a person's cell   in the cell, a line that moves  in a thread, widgets; returns at once
a batch run       in the cell, a line that moves  in the cell, a picture that stays
a script          a line in the terminal          the same line
"""

from __future__ import annotations

import contextvars
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from kit.errors import KitError, SessionError
from kit.reports import STEP, EvalReport, StepReport, TrainingState, TrainingStatus, TrainReport
from kit.reports.training import Until
from kit.tracking.recorder import current_run
from kit.utils import interrupts
from kit.utils.arguments import at_least_one
from kit.utils.tracebacks import WaitingEndedError
from kit.viz.live.frontend import Frontend, frontend

if TYPE_CHECKING:
    from kit.lifecycle.start import SessionParts


Asked = Literal["", "run", "pause", "stop"]

Step = Callable[[], StepReport]

Callback = Callable[[StepReport], object]


@dataclass(frozen=True, slots=True)
class Hooks:
    """What a training calls beside its steps."""

    callbacks: Sequence[Callback] = ()
    """Called after each step; one that raises is a warning."""
    evaluate: Callable[[], EvalReport] | None = None
    """Measures held-out prompts, before the first step too if that is due."""


PACE = 20
"""Steps that the time left is reckoned from."""
CLOSED = "the session was closed"


class Training:
    """Steps of a session that can be paused, continued, taken one by one and stopped.

    Args:
        parts: of a running session.
        step: does one step of it.
        total: how many steps.
        until: called after each step; True ends training.
        on_step: called after each step, in the loop's thread.
        hooks: what else is called.
    """

    def __init__(
        self,
        parts: SessionParts,
        step: Step,
        total: int,
        until: Until | None = None,
        on_step: Callable[[StepReport], None] | None = None,
        hooks: Hooks | None = None,
    ) -> None:
        self.total = total
        self._hooks = hooks or Hooks()
        self._first: EvalReport | None = None
        """The evaluation before the first step."""
        self._parts, self._step, self._until, self._on_step = parts, step, until, on_step
        self.changed = threading.Condition()
        self._state: TrainingState = "ready"
        self._wanted: Literal["run", "pause", "stop"] = "pause"
        self._singles = 0
        """Steps that `step_once` asked for and that have not begun."""
        self._steps: list[StepReport] = []
        self._begin = parts.state.step
        """The session's step when it began."""
        self._loaded = 0
        """Steps before those that a checkpoint held, where a batch run is resumed."""
        self._paces: deque[float] = deque(maxlen=PACE)
        self._seconds = 0.0
        self._stopped = ""
        self._at: int | None = None
        """The step that is being done, or was done last."""
        self._before: StepReport | None = None
        """The session's last step when that one began."""
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        """The one that the loop runs in."""
        self._watchers: list[Callable[[], None]] = []
        self._closing = False
        self.shown: Any = None
        """What displays it, once something does; `kit.viz.live` keeps it here."""

    # ---- what it is at -------------------------------------------------------------------------

    @property
    def state(self) -> TrainingState:
        """`ready`, `running`, `paused`, `stopped`, `finished` or `failed`."""
        return self._state

    @property
    def done(self) -> int:
        """Steps that are done."""
        return self._loaded + len(self._steps)

    @property
    def ended(self) -> bool:
        """Whether there will be no further step."""
        return self._state in ("stopped", "finished", "failed")

    @property
    def goes_on(self) -> bool:
        """Whether it is to continue: started, and neither paused nor stopped since."""
        return self._wanted == "run" and not self.ended

    @property
    def is_in_this_thread(self) -> bool:
        """Whether the caller runs inside a step of this training."""
        return threading.current_thread() is self._thread

    @property
    def status(self) -> TrainingStatus:
        """State, progress and metrics of this moment."""
        with self.changed:
            paces, error = self._paces, self._error
            kind = "" if isinstance(error, KitError) else f"{type(error).__name__}: "
            return TrainingStatus(
                state=self._state,
                total=self.total,
                done=self.done,
                asked=self._asked(),
                step=self._parts.state.step,
                history=tuple(self._parts.state.history),
                last=self._steps[-1] if self._steps else None,
                step_seconds=sum(paces) / len(paces) if paces else float("nan"),
                stopped=self._stopped,
                error=f"{kind}{error}" if error else "",
            )

    def _asked(self) -> Asked:
        """Request that has not taken effect yet."""
        running = self._state == "running"
        if self.ended or (running and (self._wanted == "run" or self._singles)):
            return ""
        if running:
            return self._wanted
        return "run" if self._wanted == "run" else ""

    @property
    def report(self) -> TrainReport:
        """Report on the finished steps."""
        steps, rows = tuple(self._steps), self._parts.state.history
        return TrainReport(
            steps=steps,
            evaluations=tuple(e for e in (self._first, *(s.evaluation for s in steps)) if e),
            seconds=self._seconds,
            stopped=self._stopped,
            history=tuple(row for row in rows if row.get(STEP, self._begin) >= self._begin),
        )

    def watch(self, changed: Callable[[], None]) -> None:
        """Call a function after every step and change of state. It must be quick."""
        self._watchers.append(changed)

    # ---- what can be asked of it ---------------------------------------------------------------

    def pause(self) -> None:
        """Pause after the running step. Returns at once; later verbs wait for it."""
        with self.changed:
            if not self.ended and self._wanted != "stop":
                self._wanted, self._singles = "pause", 0
                self._tell()

    def resume(self) -> None:
        """Continue, or begin. Raises SessionError once it has ended."""
        with self.changed:
            self._refuse_after_the_end("resume")
            self._wanted, self._singles = "run", 0
            self._start()

    def step_once(self) -> None:
        """Take one step and pause. Raises SessionError while it runs and once it has ended."""
        with self.changed:
            self._refuse_after_the_end("step_once")
            if self.goes_on:
                raise SessionError(
                    "step_once was called while training runs.", fix="call pause() first."
                )
            self._singles += 1
            self._start()

    def stop(self, why: str = "stopped by hand") -> None:
        """End after the running step. Returns at once; further calls do nothing."""
        with self.changed:
            if self.ended or self._wanted == "stop":
                return
            self._wanted, self._stopped = "stop", why
            if self._state == "ready":  # nothing is there that could end it
                self._state = "stopped"
            self._tell()

    def wait(self) -> TrainReport:
        """Wait for the end. Interrupting it ends the waiting, not the training.

        Raises:
            SessionError: it has not been started.
            Exception: what a step raised.
        """
        with self.changed:
            if self._thread is None and not self.ended:
                raise SessionError(
                    "wait was called on a training that has not begun.", fix="call resume() first."
                )
            # In short waits: one without end would not see an interrupt that the system handed to
            # another thread.
            try:
                while not self.changed.wait_for(lambda: self.ended, timeout=1.0):
                    pass
            except KeyboardInterrupt:
                raise WaitingEndedError(
                    f"The waiting has ended, the training has not: {self.done} of {self.total} "
                    "steps are done. wait() waits again, stop() ends it."
                ) from None
        if self._error:
            raise self._error
        return self.report

    def run(self) -> TrainReport:
        """Run all steps in the caller's thread. An interrupt ends it and keeps finished steps."""
        self._wanted, self._thread = "run", threading.current_thread()
        try:
            with self._parts.lock.take("train"):
                self._loop()
        except KeyboardInterrupt:
            self._keep_the_last()
            self._end("stopped", self._interrupted())
        except BaseException as error:
            self._keep_the_last()
            self._end("failed", error=error)
            raise
        return self.report

    def close(self, seconds: float) -> bool:
        """Stop, and wait so long for the running step; returns whether the thread has ended."""
        self._closing = True
        self.stop(CLOSED)
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return True
        thread.join(seconds)
        return not thread.is_alive()

    # ---- the loop ------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the thread, or wake it. It prints into the cell that this is called from."""
        if self._thread is None:
            context = contextvars.copy_context()
            # A daemon: else a kernel could not end before the last step.
            self._thread = threading.Thread(
                target=context.run, args=(self._run_apart,), name="kit-training", daemon=True
            )
            self._thread.start()
        self._tell()

    def _run_apart(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self._keep_the_last()
            if self._closing and isinstance(error, Exception):
                self._end("stopped", self._stopped)  # the stack went away under the step
            else:
                self._end("failed", error=error)

    def _loop(self) -> None:
        parts = self._parts
        self._begin = parts.state.step
        if parts.tracker.recorder:
            with parts.lock.take("train"):
                self._loaded = parts.begin_training(self.total)
        try:
            while self._wait_for_work():
                with parts.lock.take("step"):
                    if self._begins():  # a pause may have been asked for while this waited its turn
                        self._do_step()
        finally:
            parts.end_training()

    def _do_step(self) -> None:
        begin, self._at = time.perf_counter(), self._parts.state.step
        self._before = self._parts.state.last_step
        if not self.done:
            self._evaluate_first()
        with interrupts.collected():
            report = self._step()
            self._steps.append(report)
        if self._on_step:
            self._on_step(report)
        for callback in self._hooks.callbacks:
            self._call(callback, report)
        if self._until and self._until(report):
            self.stop("the condition given as `until` was met")
        self._paces.append(time.perf_counter() - begin)
        self._seconds += self._paces[-1]
        self._tell()

    def _evaluate_first(self) -> None:
        """Evaluate before the first step, if that is due and these weights were not yet."""
        state, settings = self._parts.state, self._parts.state.config.evaluation
        evaluate = self._hooks.evaluate
        if evaluate is None or not settings.interval or settings.skip_eval_before_train:
            return
        if self._parts.sampler.held_out and state.evaluated != self._parts.weight_version:
            self._first = evaluate()

    def _call(self, callback: Callback, report: StepReport) -> None:
        try:
            callback(report)
        except Exception as error:  # a night's training is worth more than a plot
            name = getattr(callback, "__name__", type(callback).__name__)
            warnings.warn(
                f"The callback {name} failed after step {report.step}: {type(error).__name__}: "
                f"{error}. Training goes on.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _keep_the_last(self) -> None:
        """Count a step that was finished when an interrupt or an error came."""
        last = self._parts.state.last_step
        if last and last is not self._before and all(last is not s for s in self._steps):
            self._steps.append(last)

    def _interrupted(self) -> str:
        if self._steps and self._steps[-1].step == self._at:
            return f"interrupted after step {self._at}"
        at = self._parts.state.step if self._at is None else self._at
        return f"interrupted in step {at}"

    def _wait_for_work(self) -> bool:
        """Wait until there is a step to do; False at the end."""
        with self.changed:
            while True:
                if self._wanted == "stop":
                    self._end("stopped", self._stopped)
                    return False
                if self.done >= self.total:
                    self._end("finished")
                    return False
                if self._wanted == "run" or self._singles:
                    return True
                self._state = "paused"
                self._tell()
                self.changed.wait()

    def _begins(self) -> bool:
        with self.changed:
            if self._wanted != "run" and not self._singles:
                return False
            self._singles = max(self._singles - 1, 0)
            self._state = "running"
            self._tell()
            return True

    def _end(
        self, state: TrainingState, stopped: str = "", error: BaseException | None = None
    ) -> None:
        with self.changed:
            self._state, self._stopped, self._error = state, stopped, error
            self._tell()

    def _tell(self) -> None:
        with self.changed:
            self.changed.notify_all()
        for changed in self._watchers:
            changed()

    def _refuse_after_the_end(self, asked: str) -> None:
        if self.ended or self._wanted == "stop":
            raise SessionError(
                f"{asked} was called on a training that has ended: "
                f"{self.done} of {self.total} steps are done.",
                fix="start another one: `session.train(steps, dashboard=True)`.",
            )

    def __repr__(self) -> str:
        return f"Training({self._state}, {self.done} of {self.total} steps)"

    def _ipython_display_(self) -> None:
        show(self)


def train(
    parts: SessionParts,
    step: Step,
    steps: int | None,
    until: Until | None,
    show: bool,
    hooks: Hooks,
) -> TrainReport:
    """Train in the caller's thread, with a progress line."""
    return _in_this_thread(parts, step, _total(parts, steps), until, show, hooks).report


def counted(parts: SessionParts, total: int) -> Iterator[int]:
    """Numbers of the steps of a loop that somebody else makes; a resumed one goes on."""
    end = parts.running().state.step + total
    with parts.lock.take("steps"):
        parts.begin_training(total)
    try:
        while parts.state.step < end:
            yield parts.state.step
    finally:
        parts.end_training()


def train_on_dashboard(
    parts: SessionParts, step: Step, steps: int | None, until: Until | None, hooks: Hooks
) -> Training:
    """Train in a thread of its own, with a dashboard that controls it.

    Where nobody is there to press its buttons, all steps are done before this returns.
    """
    where, total = _where(), _total(parts, steps)
    if where == "terminal":
        return _in_this_thread(parts, step, total, until, True, hooks)
    training = _register(parts, Training(parts, step, total, until, hooks=hooks))
    if where == "live":
        training.resume()
        show(training)
    else:
        show(training)
        training.run()
    return training


def _in_this_thread(
    parts: SessionParts, step: Step, total: int, until: Until | None, show: bool, hooks: Hooks
) -> Training:
    from kit.viz.live.progress import Progress

    with Progress(total, enabled=show) as progress:
        training = Training(parts, step, total, until, progress.update, hooks)
        training.run()
    return training


def dashboard(
    parts: SessionParts, step: Step, steps: int | None, hooks: Hooks | None = None
) -> Training:
    """Show the session's training; one that can be started where there is none, or with `steps`."""
    _ = parts.stack  # refuses where the session is not running
    training = parts.lock.training
    asked = steps is not None and (training is None or training.ended or steps != training.total)
    if training is None or (asked and (training.ended or training.state == "ready")):
        training = _register(parts, Training(parts, step, _total(parts, steps), hooks=hooks))
    elif training.ended:
        print("This training has ended. session.dashboard(20) has buttons for 20 more steps.")
    show(training)
    return training


def show(training: Training) -> None:
    """Display a training, with buttons where they can be pressed."""
    where = _where()
    if where == "terminal":
        print(training)
    else:
        from kit.viz.live.widgets import show_training

        show_training(training, live=where == "live")


def _where() -> Frontend:
    where = frontend()
    return "headless" if where == "live" and current_run() else where


def _total(parts: SessionParts, steps: int | None) -> int:
    planned = parts.state.config.training.num_rollout
    return planned if steps is None else at_least_one(steps, "steps")


def _register(parts: SessionParts, training: Training) -> Training:
    """Make a training the session's own. Raises SessionError if another one is unfinished."""
    with parts.lock.take("train"):
        _ = parts.stack  # refuses where the session is not running
        before = parts.lock.training
        if before and not before.ended:
            if before.done:
                raise SessionError(
                    f"Another training is paused: {before.done} of {before.total} steps are done.",
                    fix="go on with it (`session.training.resume()`, or its button), or end it "
                    "first: `session.training.stop()`.",
                )
            before.stop("another training was begun")
        parts.lock.training = training
    return training
