"""Compiles what a trainer's first update will need, before anybody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from kit.model.packing import pack
from kit.stack.device import out_of_memory
from kit.stack.fsdp import without_gradient

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer

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
    with out_of_memory(most, [policy]):
        for rows, share in product(sorted({min(FEW, most), most}), (True, False)):
            tokens = list(_samples(rows))
            lengths = [len(sample) - PROMPT for sample in tokens]
            packed = pack(tokens, lengths, share=share).to(trainer.device)
            without_gradient(policy, packed, heat)
            logp_R, entropy_R = policy(packed, heat)
            loss = logp_R.mean()
            if trainer.settings.training.entropy_coef:  # the gradient of logits is compiled for it
                loss = loss + 0.0 * entropy_R.mean()
            loss.backward()
    for parameter in policy.parameters():
        parameter.grad = None


def _samples(rows: int) -> Iterator[list[int]]:
    """Samples of about so many tokens, two to each prompt and no two of one length."""
    response = max(rows // SAMPLES - PROMPT, SAMPLES)
    for number in range(SAMPLES):
        yield [1 + number // 2] * PROMPT + [2 + number] * (response - number)
