"""`session.train` and `session.dashboard`: where the loop of steps runs, and who sees it.

where             without dashboard              with it
a person's cell   in the cell, a line that moves  in a thread, widgets; returns at once
a batch run       in the cell, a line that moves  in the cell, a picture that stays
a script          a line in the terminal          the same line
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.arguments import at_least_one
from kit.errors import SessionError
from kit.reports import TrainReport
from kit.runs.record import current_run
from kit.training import Training, Until
from kit.viz.frontend import Frontend, frontend

if TYPE_CHECKING:
    from kit.session import RLSession


def train(session: RLSession, steps: int | None, until: Until | None, show: bool) -> TrainReport:
    """A loop of steps, with a line that moves."""
    from kit.viz.progress import Progress

    total = _total(session, steps)
    with Progress(total, enabled=show) as progress:
        return Training(session, total, until, progress.update).run()


def train_on_dashboard(session: RLSession, steps: int | None, until: Until | None) -> Training:
    """The same in a thread, under a dashboard that steers it.

    Where nobody is there to press its buttons, all steps are done before this returns.
    """
    from kit.viz.progress import Progress

    where = _where()
    if where == "terminal":
        total = _total(session, steps)
        with Progress(total) as progress:
            training = Training(session, total, until, progress.update)
            training.run()
        return training
    training = _take_the_place(session, Training(session, _total(session, steps), until))
    if where == "live":
        training.resume()
        show(training)
    else:
        show(training)
        training.run()
    return training


def dashboard(session: RLSession, steps: int | None) -> Training:
    """Show the training under way; without one, the history so far and one that can be begun."""
    session._running  # noqa: B018 - refuses where there is none
    training = session.training
    if training is None or training.ended:
        training = _take_the_place(session, Training(session, _total(session, steps)))
    show(training)
    return training


def show(training: Training) -> None:
    """Display a training, with buttons where they can be pressed."""
    where = _where()
    if where == "terminal":
        print(training)
    else:
        from kit.viz.live import show_training

        show_training(training, live=where == "live")


def _where() -> Frontend:
    where = frontend()
    return "headless" if where == "live" and current_run() else where


def _total(session: RLSession, steps: int | None) -> int:
    return session.config.training.num_rollout if steps is None else at_least_one(steps, "steps")


def _take_the_place(session: RLSession, training: Training) -> Training:
    """Make a training the session's own. Raises SessionError where another one is half done."""
    with session._turns.take("train"):
        session._running  # noqa: B018 - refuses where there is none
        before = session.training
        if before and not before.ended:
            if before.done:
                raise SessionError(
                    f"Another training is paused: {before.done} of {before.total} steps are done.",
                    fix="go on with it (`session.training.resume()`, or its button), or end it "
                    "first: `session.training.stop()`.",
                )
            before.stop("another training was begun")
        session._turns.training = training
    return training
