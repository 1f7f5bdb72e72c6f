"""The second half of a step: what follows once its update has been made."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kit import checkpoint
from kit.metrics import step_metrics
from kit.reports import MismatchReport, StepReport, UpdateReport
from kit.samples import Rollout

if TYPE_CHECKING:
    from kit.session import RLSession


def finish(
    session: RLSession,
    rollout: Rollout,
    checked: MismatchReport | None,
    update: UpdateReport,
    index: int,
    begin: float,
) -> StepReport:
    """Sync, evaluate and save where it is due, and keep the step's metrics.

    Args:
        session: with the update applied.
        rollout: what the update was trained on.
        checked: the mismatch check, where one was due.
        update: the update.
        index: the step's number.
        begin: when it began, in seconds of `time.perf_counter()`.
    """
    sync = session.sync()
    metrics = step_metrics(rollout, update, sync, time.perf_counter() - begin)
    interval = session.config.evaluation.interval
    evaluated = session.evaluate() if due(index + 1, interval) else None
    if evaluated:
        metrics |= evaluated.metrics
    session.history.append(metrics)
    if session._recorder:
        session._recorder.step(metrics, index)
    if due(index + 1, session.config.checkpoint.interval):
        checkpoint.save_step(session)
    return StepReport(index, metrics, rollout, update, sync, checked, evaluated)


def due(step: int, interval: int) -> bool:
    """Is it the turn of what happens every `interval` steps? Never with 0."""
    return bool(interval) and step % interval == 0
