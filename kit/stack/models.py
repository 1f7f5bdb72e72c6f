"""How a trainer's models are made: loaded on the host, placed on the device, sharded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kit.config import TrainingConfig
from kit.model.compiled import Recompute, compile_layers, recompute
from kit.model.policy import Policy, load
from kit.stack.critic import Critic, ValueModel
from kit.stack.fsdp import shard


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
