"""`Critic`: the value model of PPO, a second FSDP2 model on the same device.

How a trainer's models are made: loaded on the host, placed on the device, sharded.

Compiles what a trainer's first update will need, before anybody waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from kit.algo.loss import value_clip, weighted_sum
from kit.config import CriticConfig, TrainingConfig
from kit.models.compile import Recompute, compile_layers, recompute
from kit.models.packing import Packed, pack
from kit.models.policy import Policy, ValueModel, load
from kit.trainer.fsdp import clip_gradients, shard, without_gradient
from kit.trainer.offload import out_of_memory

if TYPE_CHECKING:
    from kit.trainer.actor import Trainer


class Critic:
    """A value model with its own optimizer."""

    def __init__(self, model: nn.Module, config: CriticConfig, optimizer: Any) -> None:
        self.model, self.config, self.optimizer = model, config, optimizer

    def values(self, packed: Packed) -> torch.Tensor:
        """What it expects now, (R), without a gradient."""
        value_R: torch.Tensor = without_gradient(self.model, packed)
        return value_R

    def backward(
        self,
        packed: Packed,
        old_value_R: torch.Tensor,
        return_R: torch.Tensor,
        weight_R: torch.Tensor,
        scale: int,
    ) -> dict[str, torch.Tensor]:
        """Add one micro-batch's gradient. Returns metrics to be summed over micro-batches.

        Args:
            packed: the samples.
            old_value_R: what it said when the advantages were made.
            return_R: what it should have said.
            weight_R: what each token counts in the loss of the optimizer step.
            scale: ranks over which FSDP will average the gradient.
        """
        value_R = self.model(packed)
        loss_R, clipped_R = value_clip(value_R, old_value_R, return_R, self.config.value_clip)
        loss = weighted_sum(loss_R, weight_R)
        (loss * scale).backward()
        metrics = {
            "train/value_loss": loss,
            "train/value_clipfrac": weighted_sum(clipped_R, weight_R),
            "train/value_mean": weighted_sum(value_R, weight_R),
            "train/return_mean": weighted_sum(return_R, weight_R),
        }
        return {name: value.detach() for name, value in metrics.items()}

    def clip(self) -> float:
        """Clip the gradient; its norm before."""
        return clip_gradients(self.model, self.config.clip_grad)

    def step(self) -> None:
        """Apply what `backward` has added up."""
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass(frozen=True, slots=True)
class Making:
    """What all models of a trainer have in common."""

    model_path: str
    training: TrainingConfig
    dtype: torch.dtype
    trust_remote_code: bool = False
    recompute: Recompute = "none"
    compile: bool = False
    offload: bool = False

    def loaded(self) -> Policy:
        """The model in host memory, float32."""
        policy = load(self.model_path, trust_remote_code=self.trust_remote_code)
        inner: Any = policy.model
        recompute(inner, inner.model.layers, self.recompute)
        if self.compile:
            compile_layers(inner.model.layers)
        return policy

    def placed(self, policy: Policy, device: torch.device, mesh: Any) -> Policy:
        """The model on the device and sharded; with offload its weights stay on the host."""
        inner: Any = policy.model
        self._place(policy, inner.model.layers, device, mesh)
        return policy

    def critic(self, policy: Policy, device: torch.device, mesh: Any) -> Critic:
        """A value model with this policy's layers, and its optimizer."""
        inner: Any = policy.model
        model = ValueModel(inner.model, inner.config.hidden_size)
        self._place(model, inner.model.layers, device, mesh)
        config = self.training.critic
        return Critic(model, config, self.adamw(model, config.learning_rate))

    def _place(self, model: nn.Module, layers: Any, device: torch.device, mesh: Any) -> None:
        if not self.offload:
            model.to(device)
        shard(model, layers, mesh, self.dtype, offload=self.offload)

    def adamw(self, model: nn.Module, rate: float) -> torch.optim.AdamW:
        """The optimizer of a model, its arithmetic in one kernel."""
        training = self.training
        return torch.optim.AdamW(
            model.parameters(),
            lr=rate,
            betas=(training.adam_beta1, training.adam_beta2),
            eps=training.adam_eps,
            weight_decay=training.weight_decay,
            fused=True,
        )

    @staticmethod
    def configure(optimizer: torch.optim.AdamW, training: TrainingConfig, rate: float) -> None:
        """Have an optimizer go on with other settings; its state stays."""
        for group in optimizer.param_groups:
            group["betas"] = (training.adam_beta1, training.adam_beta2)
            group["eps"], group["weight_decay"] = training.adam_eps, training.weight_decay
            group["lr"] = rate


PROMPT = 32


FEW = 2048
"""Rows of a small micro-batch, which is compiled apart; enough to have logits made in pieces."""


SAMPLES = 8


def run(trainer: Trainer) -> None:
    """A forward and a backward pass of each kind; nothing of it is left.

    Raises:
        StackError: the device has too little memory for the planned micro-batches.
    """
    policy, heat, most = trainer.policy, trainer.settings.temperature, trainer.settings.max_tokens
    forward = trainer.settings.max_tokens_forward
    with out_of_memory(most, [policy]):
        for share in (True, False):
            for rows in sorted({min(FEW, most), forward}):
                without_gradient(policy, _packed(trainer, rows, share), heat)
        for rows, share in product(sorted({min(FEW, most), most}), (True, False)):
            logp_R, entropy_R = policy(_packed(trainer, rows, share), heat)
            loss = logp_R.mean()
            if trainer.settings.training.entropy_coef:  # the gradient of logits is compiled for it
                loss = loss + 0.0 * entropy_R.mean()
            loss.backward()
    for parameter in policy.parameters():
        parameter.grad = None


def _packed(trainer: Trainer, rows: int, share: bool) -> Packed:
    tokens = list(_samples(rows))
    lengths = [len(sample) - PROMPT for sample in tokens]
    return pack(tokens, lengths, share=share).to(trainer.device)


def _samples(rows: int) -> Iterator[list[int]]:
    """Samples of about so many tokens, two to each prompt and no two of one length."""
    response = max(rows // SAMPLES - PROMPT, SAMPLES)
    for number in range(SAMPLES):
        yield [1 + number // 2] * PROMPT + [2 + number] * (response - number)
