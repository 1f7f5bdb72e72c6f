"""`OptimizerSteps`: the part of a trainer that turns samples into one step of the weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from kit.algo.schedule import learning_rate
from kit.errors import StackError
from kit.model.packing import Packed, pack, to_device
from kit.model.policy import Policy
from kit.stack.batches import TrainBatch, flat, rank_share, worth_sharing
from kit.stack.corrections import Corrections
from kit.stack.critic import Critic
from kit.stack.culprit import culprit
from kit.stack.device import out_of_memory
from kit.stack.fsdp import clip_gradients, hold_gradients, recover
from kit.stack.policy_loss import LossSettings, TokenInputs, finish, policy_loss
from kit.stack.stopping import StopSign
from kit.stack.sums import Sums

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer
    from kit.stack.trainer_settings import TrainerSettings

CHECKED = ("train/loss", "train/grad_norm", "train/value_loss", "train/critic_grad_norm")
"""What has to be a number, or the step would destroy the weights."""


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
            advantage_R=to_device(batch.flat_advantages(indices), self.device),
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
