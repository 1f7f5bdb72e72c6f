"""Compiles what a trainer's first update will need, before anybody waits for it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

from kit.model.packing import Packed, pack
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
