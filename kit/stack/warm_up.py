"""Compiles what a trainer's first update will need, before anybody waits for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.model.packing import pack
from kit.stack.fsdp import without_gradient

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer

LENGTHS = ((24, 700), (40, 300))
"""(prompt, response) tokens of two groups: enough to have logits made in pieces."""


def run(trainer: Trainer) -> None:
    """A forward and a backward pass of each kind; nothing of it is left."""
    policy, heat = trainer.policy, trainer.settings.temperature
    tokens = [[1] * p + [2 + i] * r for p, r in LENGTHS for i in range(2)]
    lengths = [r for _, r in LENGTHS for _ in range(2)]
    for share in (True, False):
        packed = pack(tokens, lengths, share=share).to(trainer.device)
        without_gradient(policy, packed, heat)
        logp_R, entropy_R = policy(packed, heat)
        loss = logp_R.mean()
        if trainer.settings.training.entropy_coef:  # the gradient of logits is compiled for it
            loss = loss + 0.0 * entropy_R.mean()
        loss.backward()
    for parameter in policy.parameters():
        parameter.grad = None
