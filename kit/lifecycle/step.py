"""The end of a step: what follows once its update has been made and handed over."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

from kit.checkpoint import checkpoint
from kit.reports import MismatchReport, StepReport, UpdateReport
from kit.samples import Rollout
from kit.tracking.metrics import step_metrics
from kit.utils import interrupts

if TYPE_CHECKING:
    from kit.session import RLSession


def hand_over(
    session: RLSession,
    rollout: Rollout,
    update: UpdateReport,
    checked: MismatchReport | None,
    begin: float,
) -> StepReport:
    """Sync, put the step's metrics into the history, and note the step as the session's last.

    Args:
        session: with the update applied.
        rollout: what the update was trained on.
        update: the update.
        checked: the mismatch check, where one was due.
        begin: when the step began, in seconds of `time.perf_counter()`.
    """
    sync = session.sync()
    metrics = step_metrics(rollout, update, sync, time.perf_counter() - begin)
    session.history.append(metrics)
    session._last_step = StepReport(update.step, metrics, rollout, update, sync, checked)
    return session._last_step


def finish(session: RLSession, done: StepReport) -> StepReport:
    """Evaluate and save where it is due, and write the step's metrics.

    An interrupt of the evaluation or of saving leaves a step that is done, and written down.

    Args:
        session: with the update applied, the weights handed over, and the metrics in its history.
        done: the step; the evaluation's metrics are added to its own.
    """
    step, metrics = done.step + 1, done.metrics
    try:
        if due(step, session.config.evaluation.interval):
            evaluated = session.evaluate()
            metrics |= evaluated.metrics
            done = session._last_step = replace(done, evaluation=evaluated)
    finally:
        with interrupts.held():  # or half a row would be written
            if session._recorder:
                session._recorder.step(metrics, done.step, done.rollout, len(session.history))
            if session._loggers:
                session._loggers.step(metrics, done.update, done.step)
    _save_where_due(session, step)
    return done


def _save_where_due(session: RLSession, step: int) -> None:
    """As the configuration says; else, in a batch run, so that it can be resumed."""
    recorder = session._recorder
    interval: int | None = session.config.checkpoint.interval
    if interval == 0 and recorder:
        interval = recorder.settings.checkpoint_every
    if interval is not None:
        if due(step, interval):
            checkpoint.save_step(session)
    elif recorder and recorder.place and session._pace.due():
        begin = time.monotonic()
        checkpoint.save_step(session, by_clock=True)
        session._pace.saved(time.monotonic() - begin)


def due(step: int, interval: int) -> bool:
    """Is it the turn of what happens every `interval` steps? Never with 0."""
    return bool(interval) and step % interval == 0
