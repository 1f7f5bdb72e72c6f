"""What `session.update` does: a batch to the trainer, and the trainer's numbers to a report."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kit.errors import SessionError
from kit.reports import Metrics, UpdateReport
from kit.samples import Batch

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def update(stack: Stack, batch: Batch, step: int) -> UpdateReport:
    """Train on a batch; a batch without samples is left alone."""
    begin = time.perf_counter()
    if not batch.samples:
        return UpdateReport(step, {}, (), 0, 0, 0.0, batch.left_out, applied=False)
    per_step, applied = stack.update(train_batch(batch), batch.id)
    return UpdateReport(
        step=step,
        metrics=means(per_step),
        per_step=tuple(per_step),
        samples=len(batch),
        tokens=sum(len(s.tokens) for s in batch.samples),
        seconds=time.perf_counter() - begin,
        left_out=batch.left_out,
        applied=applied,
    )


def means(per_step: Sequence[Metrics]) -> Metrics:
    """Each metric's mean over the optimizer steps of an update."""
    return {name: sum(row[name] for row in per_step) / len(per_step) for name in per_step[0]}


def nothing_to_train_on(report: UpdateReport) -> SessionError:
    """The error of a step whose update did nothing."""
    return SessionError(
        "No group of this rollout could be trained on.",
        why="\n".join(report.left_out[:4]),
        fix="mend the reward function; the message above is its own.",
    )


def train_batch(batch: Batch) -> Any:
    """The batch as trainers take it: a `TrainBatch` of plain lists."""
    from kit.stack.batches import TrainBatch

    samples = batch.samples
    logged = all(s.rollout_log_probs is not None for s in samples)
    return TrainBatch(
        tokens=[s.tokens for s in samples],
        response_lengths=[s.response_length for s in samples],
        loss_masks=[s.mask for s in samples],
        advantages=list(batch.advantages),
        rollout_log_probs=[s.rollout_log_probs or [] for s in samples] if logged else None,
        token_advantages=_as_lists(batch.token_advantages),
        values=_as_lists(batch.values),
        returns=_as_lists(batch.returns),
    )


def _as_lists(rows: Sequence[Sequence[float]] | None) -> list[list[float]] | None:
    return None if rows is None else [list(row) for row in rows]
