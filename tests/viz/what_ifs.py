"""Snapshots and what-if results, made by hand."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

from kit.config import TrainingConfig
from kit.diagnostics.what_if import movement
from kit.reports.status import Snapshot, Snapshots
from kit.reports.what_if import Trial, WhatIf
from kit.samples import Batch, Rollout, Sample
from tests.viz.results import make_batch, make_update


def make_snapshots() -> Snapshots:
    """Three, one of them on disk, one of the present weights."""
    kept = [("before", 3, 3, 0.48, 10_800_000), ("hot", 4, 4, 0.21, 10_800_000)]
    made = [
        Snapshot(name, step, version, reward, size, 1.76e9 + 40 * version)
        for name, step, version, reward, size in kept
    ]
    disk = Path("/work/checkpoints/tiny-snapshot-long run")
    made.append(Snapshot("long run", 12, 14, 0.81, 11_200_000, 1.76e9 + 900, disk))
    return Snapshots(tuple(made), now=14)


def make_what_if(label: str = "learning_rate 0.001", refused: str = "") -> WhatIf:
    """An update as configured, with a rate that is too high, and one that was refused."""
    batch = make_batch()
    before = _annotated(batch.rollout, None)
    trials = [_trial("as configured", before, batch, 0.05), _trial(label, before, batch, 1.5)]
    message = refused or "The update was refused: gradient norm is NaN."
    training = TrainingConfig(learning_rate=0.1)
    trials.append(Trial("learning_rate 0.1", {}, training, None, None, None, message))
    words = "Weights version 2 wrote the batch, and the trials began with version 3."
    return WhatIf(tuple(trials), batch, before, 3, 3, "before", 0.5, (words,))


def _trial(label: str, before: Rollout, batch: Batch, size: float) -> Trial:
    after = _annotated(before, size)
    update = make_update()
    update = replace(update, metrics=update.metrics | {"train/lr": size / 500})
    return Trial(label, {}, TrainingConfig(), update, movement(after), after)


def _annotated(rollout: Rollout, size: float | None) -> Rollout:
    """With the log-probs of before, or with both, apart by about this much."""
    chance = random.Random(7)

    def known(sample: Sample) -> Sample:
        old = sample.token_values.get("trainer_log_prob") or list(sample.rollout_log_probs or ())
        if size is None:
            values = sample.token_values | {"trainer_log_prob": old}
            return replace(sample, token_values=values, annotated_versions=[3])
        way = sample.token_values["advantage"][0] - size / 2
        new = [min(x + size * (way + chance.gauss(0, 1)), -1e-4) for x in old]
        values = {"trainer_log_prob": new, "trainer_log_prob_before": old}
        return replace(sample, token_values=sample.token_values | values, annotated_versions=[3, 4])

    return rollout.with_samples(map(known, rollout))
