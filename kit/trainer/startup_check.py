"""The trainer's share of `session.check()`: one update that must not do anything."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from kit.messages import TrainBatch
from kit.models.sharding import local
from kit.trainer.backend import TrainerBackend
from kit.trainer.learner import POLICY, REFERENCE
from kit.trainer.process_group import NEVER
from kit.trainer.state import TrainerState, forked_random
from kit.trainer.step import TrainStep


@dataclass(frozen=True, slots=True)
class Startup:
    """Results of the check; in a healthy session all are zero but `entropy` and `values`."""

    ppo_kl: float
    """Mean over tokens of old minus new log-prob, before any step."""
    clip_fraction: float
    entropy: float
    """Mean over tokens, in nats; NaN where one of them is not finite or below zero."""
    reference_gap: float | None
    """Largest |actor - reference| log-prob; None once the actor has been trained, here or before an
    adapter was read."""
    changed_values: int
    """Weights that an update at learning rate 0 changed; a zero may change its sign."""
    values: int
    """Weights there are."""


def startup(
    backend: TrainerBackend,
    train_step: TrainStep,
    state: TrainerState,
    batch: TrainBatch,
) -> Startup:
    """Look at a first update without making one. Everything is as before afterwards."""
    with forked_random(backend.device):
        kl, clipped, entropy = _first_step(train_step, batch)
        adapters = train_step.settings.lora
        trained = state.optimizer_steps or (adapters and adapters.adapter_path is not None)
        gap = None if trained else _reference_gap(backend, train_step, batch)
        changed, values = _update_at_rate_zero(backend, train_step, state, batch)
    return Startup(kl, clipped, entropy, gap, changed, values)


def _first_step(train_step: TrainStep, batch: TrainBatch) -> tuple[float, float, float]:
    """(ppo_kl, clip fraction, entropy): old log-probs, and those of the update's first pass."""
    training = train_step.settings.training
    low = 1 - training.eps_clip
    high = 1 + (training.eps_clip_high or training.eps_clip)
    (old, _), (new,) = (
        train_step.log_probs_before(batch, [POLICY]),
        train_step.score_as_updated(batch, [POLICY]),
    )
    assert old is not None
    active_R = torch.tensor([m for mask in batch.loss_masks for m in mask]).bool()
    old_R, new_R, entropy_R = (
        torch.cat(rows).cpu()[active_R].double() for rows in (old, new.log_probs, new.entropies)
    )
    ratio_R = (new_R - old_R).exp()
    healthy = bool(entropy_R.isfinite().all()) and bool((entropy_R >= -1e-6).all())
    return (
        float((old_R - new_R).mean()),
        float(((ratio_R < low) | (ratio_R > high)).double().mean()),
        float(entropy_R.mean()) if healthy else math.nan,
    )


def _reference_gap(backend: TrainerBackend, train_step: TrainStep, batch: TrainBatch) -> float:
    """Largest difference of a log-prob between the policy and the model of the start."""
    with backend.with_reference():
        policy, reference = train_step.score_as_updated(batch, [POLICY, REFERENCE])
    gap_T = (torch.cat(policy.log_probs) - torch.cat(reference.log_probs)).abs()
    return float(gap_T.max()) if bool(gap_T.isfinite().all()) else math.nan


def _update_at_rate_zero(
    backend: TrainerBackend, train_step: TrainStep, state: TrainerState, batch: TrainBatch
) -> tuple[int, int]:
    """(weights whose bits changed, weights), over all ranks."""
    frozen = {
        "learning_rate": 0.0,
        "min_learning_rate": 0.0,
        "advantage_estimator": "grpo",  # made-up advantages, for which there are no values
        "ref_update_interval": 0,
    }
    settings = train_step.settings
    training = settings.training.model_copy(update=frozen)
    before = state.copy()
    weights = {name: local(value).clone() for name, value in backend.named_trained()}
    try:
        replace(train_step, settings=replace(settings, training=training)).update(batch, NEVER)
        changed = [(local(value) != weights[name]).sum() for name, value in backend.named_trained()]
    finally:
        backend.recover()
        state.put_back(before)
    counts = torch.tensor([int(sum(changed)), sum(old.numel() for old in weights.values())])
    dist.all_reduce(counts)
    return int(counts[0]), int(counts[1])
