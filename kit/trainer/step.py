"""`OptimizerSteps`: the part of a trainer that turns samples into one step of the weights.

`Sums`: metrics added up over micro-batches on the device, and over ranks at the end.

Reading a number makes the host wait for the device; here that happens once an optimizer step.

Which sample and which token made an update that had to be refused.

How an update hears that it is to stop: a file that is looked for between micro-batches.

A trainer is busy while it works and answers no call, so the client makes a file. All ranks get the
same answer at the same boundary, or some would wait for the others for ever.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import nn

from kit.algo.schedule import learning_rate
from kit.errors import StackError, StoppedError
from kit.messages import TrainBatch
from kit.models.packing import Packed, pack, to_device
from kit.models.policy import Policy
from kit.trainer.batch import flat, flat_advantages, rank_share, worth_sharing
from kit.trainer.fsdp import clip_gradients, hold_gradients, recover, without_gradient
from kit.trainer.learner import Critic
from kit.trainer.loss import (
    Corrections,
    LossSettings,
    TokenInputs,
    finish,
    policy_loss,
    token_terms,
)
from kit.trainer.offload import out_of_memory

if TYPE_CHECKING:
    from kit.trainer.actor import Trainer
    from kit.trainer.settings import TrainerSettings


CHECKED = ("train/loss", "train/grad_norm", "train/value_loss", "train/critic_grad_norm")
"""What has to be a number, or the step would destroy the weights."""


@dataclass(frozen=True, slots=True)
class StopSign:
    """What one update looks at."""

    file: str | None = None
    """None is never there."""

    def look(self) -> None:
        """Raise StoppedError if the file is there; all ranks call."""
        if self.file is None:
            return
        there = os.path.exists(self.file)
        if dist.get_world_size() > 1:
            seen = torch.tensor([int(there)])
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            there = bool(seen)
        if there:
            raise StoppedError(
                "The update was stopped between two micro-batches: weights and optimizer are as "
                "before it."
            )


class OptimizerSteps:
    """What `Trainer.update` repeats: gradient of all micro-batches, clipping, AdamW."""

    settings: TrainerSettings
    device: torch.device
    policy: Policy
    optimizer: torch.optim.AdamW
    critic: Critic | None
    optimizer_steps: int
    updates: int
    stop_sign: StopSign

    def _optimizer_step(
        self,
        batch: TrainBatch,
        part: Sequence[int],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        corrections: Corrections,
    ) -> dict[str, float]:
        settings = self.loss_settings(batch, part)
        learns = not (self.critic and self.updates < self.critic.config.warmup_rollouts)
        self._give_up()  # what broke off half-way leaves gradients behind
        sums = Sums(self.device)
        with out_of_memory(self.settings.max_tokens, self._models()):
            self._backward(batch, part, old, reference, corrections, settings, learns, sums)
        total = sums.total()
        norms = self._clip()
        if wrong := _not_finite(finish(total) | norms):
            self._forget_gradients()
            found = culprit(self._as_trainer, batch, part, old, reference, corrections)
            raise refused(wrong, found)
        return self._apply(total, norms, learns=learns)

    def _models(self) -> list[nn.Module]:
        """Those that learn."""
        return [self.policy, *([self.critic.model] if self.critic else [])]

    def _backward(
        self,
        batch: TrainBatch,
        part: Sequence[int],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        corrections: Corrections,
        settings: LossSettings,
        learns: bool,
        sums: Sums,
    ) -> None:
        """Add up the gradient of an optimizer step, micro-batch by micro-batch."""
        training = self.settings.training
        limit, rank = self.settings.max_tokens, self.settings.rank
        share = worth_sharing(batch.tokens, batch.response_lengths, self.device)
        parts = rank_share(batch, part, training.num_trainers, limit, rank, share=share)
        for number, members in enumerate(parts):
            self.stop_sign.look()
            for model in self._models():
                hold_gradients(model, training.num_trainers == 1 and number < len(parts) - 1)
            indices = members or [part[0]]
            packed = pack(
                [batch.tokens[i] for i in indices],
                [batch.response_lengths[i] for i in indices],
                share=share,
            ).to(self.device)
            inputs = self.inputs(batch, indices, old, reference, corrections, bool(members))
            logp_R, entropy_R = self.policy(packed, self.settings.temperature)
            loss, values = policy_loss(logp_R, entropy_R, packed.sample_R, inputs, settings)
            # FSDP averages gradients over ranks; ours are shares of one sum.
            (loss * training.num_trainers * learns).backward()
            if self.critic:
                values |= self._critic_backward(batch, indices, packed, inputs, settings)
            sums.add(values)
        self.stop_sign.look()

    def loss_settings(self, batch: TrainBatch, part: Sequence[int]) -> LossSettings:
        """What the loss of an optimizer step over these samples needs to know of all of them."""
        return LossSettings(
            self.settings.training,
            total_samples=len(part),
            total_tokens=sum(sum(batch.loss_masks[i]) for i in part),
            constant_length=self.settings.max_response_len,
        )

    def _critic_backward(
        self,
        batch: TrainBatch,
        indices: list[int],
        packed: Packed,
        inputs: TokenInputs,
        settings: LossSettings,
    ) -> dict[str, torch.Tensor]:
        assert self.critic
        if batch.values is None or batch.returns is None:
            raise StackError(
                "The batch has no values for the critic to learn.",
                fix="make it with `session.advantages(rollout)` of this session.",
            )
        old, returns = (
            to_device(flat(x, indices), self.device) for x in (batch.values, batch.returns)
        )
        weight_R = settings.weights(inputs.mask_R, packed.sample_R)
        return self.critic.backward(
            packed, old, returns, weight_R, self.settings.training.num_trainers
        )

    def inputs(
        self,
        batch: TrainBatch,
        indices: list[int],
        old: list[torch.Tensor] | None,
        reference: list[torch.Tensor] | None,
        corrections: Corrections,
        counts: bool = True,
    ) -> TokenInputs:
        """What is known of each response token of these samples; `counts` False masks them all."""
        mask = torch.tensor([m for i in indices for m in batch.loss_masks[i]], dtype=torch.float32)
        rollout = None
        if batch.rollout_log_probs is not None:
            rollout = to_device(flat(batch.rollout_log_probs, indices), self.device)
        weight, keep = corrections.of_samples(indices)
        return TokenInputs(
            advantage_R=to_device(flat_advantages(batch, indices), self.device),
            mask_R=to_device(mask if counts else torch.zeros_like(mask), self.device),
            old_logp_R=torch.cat([old[i] for i in indices]) if old else None,
            ref_logp_R=torch.cat([reference[i] for i in indices]) if reference else None,
            rollout_logp_R=rollout,
            weight_R=weight,
            keep_R=keep,
        )

    def _clip(self) -> dict[str, float]:
        """Clip the gradients; their norms before."""
        norms = {"train/grad_norm": clip_gradients(self.policy, self.settings.training.clip_grad)}
        if self.critic:
            norms["train/critic_grad_norm"] = self.critic.clip()
        return norms

    def _apply(
        self, sums: dict[str, float], norms: dict[str, float], *, learns: bool
    ) -> dict[str, float]:
        """Make the step, and return its metrics.

        Args:
            sums: over micro-batches and ranks.
            norms: of the gradients before they were clipped.
            learns: does the policy learn in this step?
        """
        training = self.settings.training
        metrics = finish(sums) | norms
        rate = learning_rate(
            self.optimizer_steps,
            peak=training.learning_rate,
            lowest=training.min_learning_rate,
            warmup=training.warmup_steps,
            total=training.num_rollout * training.steps_per_rollout,
            schedule=training.lr_schedule,
        )
        if learns:
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.step()
            self.optimizer_steps += 1
        if self.critic:
            self.critic.step()
        self._forget_gradients()
        return metrics | {"train/lr": rate if learns else 0.0}

    def _give_up(self) -> None:
        """Forget what of an optimizer step is done; models can be used again, wherever it was."""
        for model in self._models():
            recover(model)
        self._forget_gradients()

    @property
    def _as_trainer(self) -> Trainer:
        return cast("Trainer", self)

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()
        if self.critic:
            self.critic.optimizer.zero_grad()


def _not_finite(metrics: dict[str, float]) -> dict[str, float]:
    return {n: metrics[n] for n in CHECKED if n in metrics and not math.isfinite(metrics[n])}


def refused(wrong: dict[str, float], found: str) -> StackError:
    """The error of an update whose loss or gradient is no number, with the token to blame."""
    numbers = ", ".join(f"{name.removeprefix('train/')} is {x}" for name, x in wrong.items())
    return StackError(
        f"The update was refused: {numbers}"
        + (f". The first to blame is {found}." if found else "; every token's own loss is finite."),
        why="A step with it would have destroyed the weights. Weights and optimizer are unchanged, "
        "earlier steps of the same update taken back.",
        fix="look at it in `session.last_batch`"
        + (", and at what made its reward" if "advantage" in found else "")
        + ("." if found else ", and lower training.learning_rate if the gradient overflows."),
    )


@dataclass(slots=True)
class Sums:
    """One float64 sum a name."""

    device: torch.device
    _names: tuple[str, ...] = field(default=())
    _total: torch.Tensor | None = None

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the values of a micro-batch; the same names each time."""
        self._names = tuple(sorted(values))
        row = torch.stack([values[name].double() for name in self._names])
        self._total = row if self._total is None else self._total + row

    def total(self) -> dict[str, float]:
        """The sums over all ranks; all of them call."""
        assert self._total is not None
        total = self._total.cpu()
        dist.all_reduce(total)
        return dict(zip(self._names, total.tolist(), strict=True))


def culprit(
    trainer: Trainer,
    batch: TrainBatch,
    part: Sequence[int],
    old: list[torch.Tensor] | None,
    reference: list[torch.Tensor] | None,
    corrections: Corrections,
) -> str:
    """The first token of an optimizer step whose numbers are not finite, in words; all ranks call.

    Empty where every token's are: then the gradient is what went wrong.
    """
    settings, training = trainer.loss_settings(batch, part), trainer.settings.training
    samples = [batch.tokens[i] for i in part], [batch.response_lengths[i] for i in part]
    for members, packed in trainer.parts(*samples):
        indices = [part[i] for i in members]
        inputs = trainer.inputs(batch, indices, old, reference, corrections)
        logp_R, entropy_R = without_gradient(trainer.policy, packed, trainer.settings.temperature)
        terms, _ = token_terms(logp_R, entropy_R, packed.sample_R, inputs, settings)
        seen = {
            "advantage": inputs.advantage_R,
            "log-prob": logp_R,
            "log-prob in the engine": inputs.rollout_logp_R,
            "log-prob before": inputs.old_logp_R,
            "log-prob of the reference": inputs.ref_logp_R,
            "share of the loss": terms.loss(training),
        }
        where = [(i, t) for i in indices for t in range(batch.response_lengths[i])]
        active_R = inputs.mask_R != 0
        for name, value_R in seen.items():
            if value_R is None:
                continue
            wrong = (~value_R.isfinite() & active_R).nonzero()
            if len(wrong):
                row = int(wrong[0])
                index, token = where[row]
                return (
                    f"sample {index} of the batch, token {token} of its response: its {name} is "
                    f"{float(value_R[row])}"
                )
    return ""


NEVER = StopSign()
