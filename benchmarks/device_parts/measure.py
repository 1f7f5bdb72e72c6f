"""One session: the first update on the batch that all rows share, then steps of its own.

The first iteration warms everything up and is left out of the times: that update, a sync that is
verified, a whole rollout, and its log-probs in the trainer.
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.device_parts.task import Task
from benchmarks.gpu_parts.workload import reward
from kit import RLSession
from kit.samples import Rollout
from kit.utils.hardware import GIB

if TYPE_CHECKING:
    from benchmarks.device_parts.worker import Report

GRADIENT = "train/grad_norm"
COMPARED = ("train/loss", GRADIENT, "train/entropy_loss", "train/ppo_kl")
POLL = 0.2
"""Seconds between two looks for the file of the first batch."""


def scale(task: Task, report: Report) -> None:
    """Everything that a row of the table shows."""
    report.say("starting")
    rows = task.workload().rows()
    with RLSession.start(task.config(), data=rows, reward=reward) as session:
        stack = session.debug.stack
        report.put("start_s", session.start_seconds)
        report.put("layout", stack.layout.in_words())
        report.put("dtype", stack.dtype)
        report.say(f"started in {session.start_seconds:.1f} s: {stack.layout.in_words()}")
        first(session, task, report)
        take_steps(session, task, report)
        report.put("gib", memory(session))


def first(session: RLSession, task: Task, report: Report) -> None:
    """The update on the batch that all rows share, a verified sync, and the mismatch after it."""
    know_tokens(session)
    rollout = first_rollout(session, task, report)
    update = session.update(session.advantages(rollout))
    report.put("first_update", {name: update.metrics[name] for name in COMPARED})
    report.put("first_update_s", update.seconds)
    report.say(f"first update: {update.seconds:.2f} s, gradient {update.metrics[GRADIENT]:.4g}")
    sync = session.sync(verify=True)
    # An engine of several devices has parts of the weights: each was erased, and came back.
    compared = task.row.tensor_parallel == 1
    report.put("verified", {"parameters": sync.verified, "compared": compared})
    report.put("first_sync_s", sync.seconds)
    found = session.check_mismatch(session.generate())
    report.put("mismatch", {"verdict": found.verdict, "mean_abs_diff": found.mean_abs_diff})
    report.say(f"mismatch {found.mean_abs_diff:.2g} ({found.verdict})")


def know_tokens(session: RLSession) -> None:
    """Look up the texts of all tokens: random weights draw from the whole vocabulary, where real
    ones use a small part of it, and the first look takes time.
    """
    for token in range(session.debug.stack.model.vocabulary):
        session.debug.sampler.token_text(token)


def first_rollout(session: RLSession, task: Task, report: Report) -> Rollout:
    """The scored samples that every row of a shape trains on first, from their file.

    The row that makes them writes the file; where that one failed, the next one does.
    """
    file = Path(task.batch)
    while not (task.makes_batch or file.exists() or task.no_batch.exists()):
        time.sleep(POLL)  # the row beside this one is about to write it
    if not file.exists():
        report.say("generating the batch that all rows train on first")
        made = session.score(session.generate())
        partial = made.save(f"{file}.{os.getpid()}")
        partial.replace(file)
    rollout = Rollout.load(file)
    report.put("batch", hashlib.sha256(file.read_bytes()).hexdigest()[:12])
    return rollout


def take_steps(session: RLSession, task: Task, report: Report) -> None:
    """Whole steps; seconds and tokens of each."""
    steps: list[dict[str, float]] = []
    for number in range(task.steps):
        done = session.step()
        metrics = done.metrics
        steps.append(
            {
                "generation_s": metrics["perf/rollout_time"],
                "update_s": metrics["perf/actor_train_time"],
                "sync_s": metrics["perf/update_weights_time"],
                "step_s": metrics["perf/step_time"],
                "new_tokens": done.rollout.new_tokens,
                "tokens": sum(len(sample.tokens) for sample in done.rollout),
            }
        )
        report.put("steps", steps)
        report.say(f"step {number + 1}: {steps[-1]['step_s']:.2f} s")
        if report.left() < 1.5 * steps[-1]["step_s"]:
            report.say("no time for more")
            break


def memory(session: RLSession) -> dict[str, Any]:
    """GiB of one device: the most that was seen, and what the plan foresaw. Empty on a CPU."""
    stack = session.debug.stack
    peaks = [size / GIB for size in stack.trainers.measured.values()]
    planned = [phase.total / GIB for phase in stack.plan.phases]
    return {"peak": round(max(peaks), 2), "planned": round(max(planned), 2)} if peaks else {}
