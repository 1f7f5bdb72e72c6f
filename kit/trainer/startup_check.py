"""The trainer's share of `session.check()`: one update that must not do anything."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from kit.trainer.fsdp import without_gradient

if TYPE_CHECKING:
    from kit.messages import TrainBatch
    from kit.models.policy import Policy
    from kit.trainer.actor import Trainer


@dataclass(frozen=True, slots=True)
class Startup:
    """What was seen; each is zero in a healthy session, save for the entropy."""

    ppo_kl: float
    """Mean over tokens of old minus new log-prob, before any step."""
    clip_fraction: float
    entropy: float
    """Mean over tokens, in nats; NaN where one of them is not finite or below zero."""
    reference_gap: float | None
    """Largest |actor - reference| log-prob; None once the actor has been trained."""
    changed_values: int
    """Weights of which an update at learning rate 0 changed a bit."""
    values: int
    """Weights there are."""


def startup(trainer: Trainer, batch: TrainBatch) -> Startup:
    """Look at a first update without making one. Everything is as before afterwards."""
    cards = [trainer.device.index] if trainer.device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        kl, clipped, entropy = _first_step(trainer, batch)
        gap = None if trainer.optimizer_steps else _reference_gap(trainer, batch)
        changed, values = _update_at_rate_zero(trainer, batch)
    return Startup(kl, clipped, entropy, gap, changed, values)


def _first_step(trainer: Trainer, batch: TrainBatch) -> tuple[float, float, float]:
    """(ppo_kl, clip fraction, entropy): old log-probs as they are scored, new ones as trained."""
    training = trainer.settings.training
    low = 1 - training.eps_clip
    high = 1 + (training.eps_clip_high or training.eps_clip)
    policy: Any = trainer.policy
    differences, entropies = [], []
    whole = trainer.parts(batch.tokens, batch.response_lengths)
    for members, packed in whole:
        old_R = without_gradient(policy, packed, trainer.settings.temperature)[0]
        new_R, entropy_R = (x.detach() for x in policy(packed, trainer.settings.temperature))
        policy.reshard()
        active_R = torch.tensor([m for i in members for m in batch.loss_masks[i]]).bool()
        differences.append((old_R - new_R).cpu()[active_R].double())
        entropies.append(entropy_R.cpu()[active_R].double())
    difference_R, entropy_R = torch.cat(differences), torch.cat(entropies)
    ratio_R = (-difference_R).exp()
    healthy = bool(entropy_R.isfinite().all()) and bool((entropy_R >= -1e-6).all())
    return (
        float(difference_R.mean()),
        float(((ratio_R < low) | (ratio_R > high)).double().mean()),
        float(entropy_R.mean()) if healthy else math.nan,
    )


def _reference_gap(trainer: Trainer, batch: TrainBatch) -> float:
    reference = trainer.reference or trainer.another()
    gaps = [0.0]
    whole = trainer.parts(batch.tokens, batch.response_lengths)
    for _, packed in whole:
        both: list[Policy] = [trainer.policy, reference]
        heat = trainer.settings.temperature
        actor_R, reference_R = (without_gradient(model, packed, heat)[0] for model in both)
        gaps.append(float((actor_R - reference_R).abs().max()))
    return max(gaps) if all(map(math.isfinite, gaps)) else math.nan


def _update_at_rate_zero(trainer: Trainer, batch: TrainBatch) -> tuple[int, int]:
    """(weights whose bits changed, weights), over all ranks."""
    with _undone(trainer) as before:
        settings = trainer.settings
        frozen = {
            "learning_rate": 0.0,
            "min_learning_rate": 0.0,
            "advantage_estimator": "grpo",  # made-up advantages, for which there are no values
            "ref_update_interval": 0,
        }
        training = settings.training.model_copy(update=frozen)
        trainer.settings = replace(settings, training=training)
        trainer.update(batch, "startup")
        changed = [
            (_local(p).view(torch.int32) != old.view(torch.int32)).sum()
            for p, old in zip(trainer.policy.parameters(), before, strict=True)
        ]
    counts = torch.tensor([int(sum(changed)), sum(old.numel() for old in before)])
    dist.all_reduce(counts)
    return int(counts[0]), int(counts[1])


@contextmanager
def _undone(trainer: Trainer) -> Iterator[list[torch.Tensor]]:
    """Gives copies of this rank's weights; what the block does to the trainer is taken back."""
    settings, steps, last = trainer.settings, trainer.optimizer_steps, trainer.last_update
    updates, critic = trainer.updates, trainer.critic
    trainer.critic = None
    optimizer = trainer.optimizer
    parameters = list(trainer.policy.parameters())
    weights = [_local(p).clone() for p in parameters]
    state = {
        p: {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in values.items()}
        for p, values in optimizer.state.items()
    }
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        yield weights
    finally:
        with torch.no_grad():
            for parameter, old in zip(parameters, weights, strict=True):
                _local(parameter).copy_(old)
        optimizer.zero_grad()
        optimizer.state.clear()
        optimizer.state.update(state)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        trainer.settings, trainer.optimizer_steps, trainer.last_update = settings, steps, last
        trainer.updates, trainer.critic = updates, critic


def _local(parameter: torch.Tensor) -> torch.Tensor:
    """This rank's shard of a parameter."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value
