"""A step's update, and what follows it.

`session.step()`:

update ──► sync ──► metrics into the history ──► evaluate ──► metrics.jsonl, loggers ──► save
           └────────── hand_over ──────────┘    └───────────────── finish ─────────────────┘

Verb by verb:

update ──► metrics into the history, metrics.jsonl, loggers ──► sync ──► evaluate ──► save
           └─────────────────── record ───────────────────┘            └─── conclude ────┘
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from kit.checkpoint import checkpoint
from kit.diagnostics import what_if
from kit.lifecycle import configure
from kit.lifecycle.resume import CheckpointClock
from kit.reports import (
    STEP,
    EvalReport,
    Metrics,
    MismatchReport,
    StepReport,
    SyncReport,
    UpdateReport,
)
from kit.rollout import batch as rollout_batch
from kit.samples import Batch, Rollout
from kit.tracking.loggers import Loggers
from kit.tracking.metrics import step_metrics
from kit.tracking.recorder import Recorder
from kit.tracking.trends import trends
from kit.utils import interrupts

if TYPE_CHECKING:
    from kit.checkpoint.state import TrainState
    from kit.lifecycle.start import SessionParts
    from kit.reports.what_if import WhatIf
    from kit.stack.stack import Stack


@dataclass(slots=True)
class Tracker:
    """Destinations of a session's metrics: the run's files, the loggers."""

    recorder: Recorder | None = None
    """Writes the files of a batch run; None in an interactive session."""
    loggers: Loggers | None = None
    """TensorBoard and the like; None where the settings ask for none."""
    clock: CheckpointClock = field(default_factory=CheckpointClock)
    """When a batch run saves so that it can be resumed."""

    def step(self, metrics: Metrics, update: UpdateReport, rollout: Rollout, rows: int) -> None:
        """Write a step's metrics; `rows` is the length of the history."""
        if self.recorder:
            self.recorder.step(metrics, update.step, rollout, rows)
        if self.loggers:
            self.loggers.step(metrics, update, update.step)

    def evaluation(self, report: EvalReport) -> None:
        """Write the metrics of an evaluation, of each held-out set."""
        for each in report.sets.values():
            if self.recorder:
                self.recorder.evaluation(each)
            if self.loggers:
                self.loggers.evaluation(each)


def hand_over(
    state: TrainState,
    sync: Callable[[], SyncReport],
    rollout: Rollout,
    update: UpdateReport,
    checked: MismatchReport | None,
    begin: float,
) -> StepReport:
    """Sync, append the step's metrics to the history, and keep the step as the last one.

    `checked` is the mismatch check, where one was due; `begin` is when the step began, in seconds
    of `time.perf_counter()`.
    """
    synced = sync()
    metrics = step_metrics(rollout, update, synced, time.perf_counter() - begin)
    state.history.append({STEP: update.step, **metrics})
    state.last_step = StepReport(
        update.step, metrics, rollout, update, synced, checked, trends=trends(state.history)
    )
    return state.last_step


def finish(
    state: TrainState,
    stack: Stack,
    tracker: Tracker,
    evaluate: Callable[[], EvalReport],
    done: StepReport,
) -> StepReport:
    """Evaluate and save if due, and write the step's metrics.

    The evaluation's metrics are added to those of the step. An interrupt of the evaluation or of
    saving leaves a step that is done, and written down.
    """
    step = done.step + 1
    try:
        if due(step, state.config.evaluation.interval):
            evaluated = evaluate()
            # A new row: the journal may have the old one, and knows rows by identity.
            state.history[-1] = state.history[-1] | evaluated.metrics
            metrics = done.metrics | evaluated.metrics
            done = state.last_step = replace(done, metrics=metrics, evaluation=evaluated)
    finally:
        with interrupts.held():  # or half a row would be written
            tracker.step(done.metrics, done.update, done.rollout, len(state.history))
    save_where_due(state, stack, tracker, step)
    return done


def update(parts: SessionParts, batch: Batch) -> UpdateReport:
    """Train on a batch. Outside of `session.step()`, that is a step, and written down."""
    state = parts.state
    with interrupts.held() as interrupted:
        state.last_batch = batch
        stack = parts.stack
        parts.journal.before_update(batch, in_step=parts.lock.in_step)
        report = rollout_batch.update(stack, batch, state.step)
        state.step += report.applied
        state.trained_batch = batch if report.applied else state.trained_batch
        interrupted.said = f"The update was made before it could stop: step {state.step}."
        if report.applied and not parts.lock.in_step:
            record(state, parts.tracker, batch.source(state.last_rollout), report)
    return report


def keep(
    parts: SessionParts, tried: WhatIf, index: int, evaluate: Callable[[], EvalReport]
) -> UpdateReport:
    """Make an update for good that was tried: a step, with its settings and the engine's sync."""
    state = parts.state
    with interrupts.held():  # or the weights would have a step that the history lacks
        before = state.config
        report = what_if.keep(state, parts.stack, parts.snapshots, parts.use, tried, index)
        configure.log(state, parts.tracker.recorder, before)
        if report.applied:
            record(state, parts.tracker, tried.batch.source(state.last_rollout), report)
    conclude(state, parts.stack, parts.tracker, evaluate)
    return report


def record(state: TrainState, tracker: Tracker, rollout: Rollout, update: UpdateReport) -> None:
    """Write down an update that was made by itself: it is a step, whose sync is still to come.

    Its row has no time of a sync and none of the whole step, which a person's pauses are part of.
    """
    metrics = step_metrics(rollout, update)
    state.history.append({STEP: update.step, **metrics})
    state.unsynced = update.step
    tracker.step(metrics, update, rollout, len(state.history))


def conclude(
    state: TrainState, stack: Stack, tracker: Tracker, evaluate: Callable[[], EvalReport]
) -> None:
    """Evaluate and save if due, where the engine got the weights of a step that was recorded."""
    if state.unsynced is None:
        return
    step, state.unsynced = state.unsynced + 1, None
    if due(step, state.config.evaluation.interval):
        state.history[-1] = state.history[-1] | evaluate().metrics
    save_where_due(state, stack, tracker, step)


def save_where_due(state: TrainState, stack: Stack, tracker: Tracker, step: int) -> None:
    """Save if the settings say so, or so that a batch run can be resumed."""
    recorder, clock = tracker.recorder, tracker.clock
    interval: int | None = state.config.checkpoint.interval
    if interval == 0 and recorder:
        interval = recorder.settings.checkpoint_every
    if interval is not None:
        if due(step, interval):
            checkpoint.save_step(state, stack, recorder)
    elif recorder and recorder.training and clock.due():
        begin = time.monotonic()
        checkpoint.save_step(state, stack, recorder, by_clock=True)
        clock.saved(time.monotonic() - begin)


def due(step: int, interval: int) -> bool:
    """Whether a step is the last of an interval; never with an interval of 0."""
    return bool(interval) and step % interval == 0
