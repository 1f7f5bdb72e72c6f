"""`Critic`: the value model of PPO, a second FSDP2 model on the same device."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from kit.algo.loss import value_clip, weighted_sum
from kit.config import CriticConfig
from kit.model import attention
from kit.model.packing import Packed
from kit.model.rows import repeat_rows
from kit.stack.fsdp import clip_gradients, without_gradient


class ValueModel(nn.Module):
    """The policy's architecture with one number a token in the place of the vocabulary."""

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)  # so that the first advantages are the returns
        nn.init.zeros_(self.value_head.bias)

    def forward(self, packed: Packed) -> torch.Tensor:
        """What is expected before each response token: value_R, float32."""
        hidden = self.backbone(
            input_ids=packed.tokens_T[None],
            position_ids=packed.position_T[None],
            use_cache=False,
            packed=attention.layout(packed, packed.tokens_T.device),
        ).last_hidden_state[0]
        value_R: torch.Tensor = self.value_head(repeat_rows(hidden, packed.predictor_R))
        return value_R[:, 0].float()


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
