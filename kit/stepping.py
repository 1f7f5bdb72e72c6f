"""The end of a step: what follows once its update has been made and handed over."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kit import checkpoint
from kit.metrics import step_metrics
from kit.reports import Metrics, MismatchReport, StepReport, SyncReport, UpdateReport
from kit.samples import Rollout

if TYPE_CHECKING:
    from kit.session import RLSession


def hand_over(
    session: RLSession, rollout: Rollout, update: UpdateReport, begin: float
) -> tuple[SyncReport, Metrics]:
    """Sync, and put the step's metrics into the history.

    Args:
        session: with the update applied.
        rollout: what the update was trained on.
        update: the update.
        begin: when the step began, in seconds of `time.perf_counter()`.
    """
    sync = session.sync()
    metrics = step_metrics(rollout, update, sync, time.perf_counter() - begin)
    session.history.append(metrics)
    return sync, metrics


def finish(
    session: RLSession,
    index: int,
    metrics: Metrics,
    rollout: Rollout,
    update: UpdateReport,
    sync: SyncReport,
    checked: MismatchReport | None,
) -> StepReport:
    """Evaluate and save where it is due, and write the step's metrics.

    Args:
        session: with the update applied, the weights handed over, and `metrics` in its history.
        index: the step's number.
        metrics: the step's; the evaluation's are added to them.
        rollout: what the update was trained on.
        update: the update.
        sync: the hand-over after it.
        checked: the mismatch check, where one was due.
    """
    config = session.config
    try:
        evaluated = session.evaluate() if due(index + 1, config.evaluation.interval) else None
        metrics |= evaluated.metrics if evaluated else {}
    finally:
        if session._recorder:
            session._recorder.step(metrics, index, rollout, len(session.history))
        if session._loggers:
            session._loggers.step(metrics, update, index)
    _save_where_due(session, index + 1)
    return StepReport(index, metrics, rollout, update, sync, checked, evaluated)


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
