"""What the trainer knows of each response token, for people to look at.

Nothing here changes weights, optimizer or randomness. All ranks run it, each for all samples, so
that every one has all the numbers; rank 0's count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kit.stack.batches import TrainBatch
from kit.stack.corrections import Corrections
from kit.stack.fsdp import without_gradient
from kit.stack.policy_loss import token_terms

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer

Rows = list[list[float]]
"""A number for each response token, sample by sample."""


def annotate_samples(
    trainer: Trainer, tokens: list[list[int]], response_lengths: list[int]
) -> dict[str, Rows]:
    """Log-prob and entropy of each response token under the present weights, in nats."""
    logp, entropy = _policy(trainer, tokens, response_lengths)
    return {"trainer_log_prob": _rows(logp), "entropy": _rows(entropy)}


def annotate_batch(trainer: Trainer, batch: TrainBatch, update_id: str) -> dict[str, Rows]:
    """The same, and what each token adds to the loss of the optimizer step that takes it.

    The loss is that of the first epoch, with the weights as they are now; the sum over an optimizer
    step's samples is its `train/loss` where the update makes only one, and that of its first step.
    There is none for a batch that the last update has been made with: the weights that its loss
    was of are gone.
    """
    logp, entropy = _policy(trainer, batch.tokens, batch.response_lengths)
    found = {"trainer_log_prob": _rows(logp), "entropy": _rows(entropy)}
    if trainer.last_update and trainer.last_update[0] == update_id:
        return found
    return found | {"loss": _loss(trainer, batch, logp, entropy)}


def _policy(
    trainer: Trainer, tokens: list[list[int]], response_lengths: list[int]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Log-prob and entropy by sample, on the device."""
    found: tuple[list[torch.Tensor], ...] = tuple([torch.empty(0)] * len(tokens) for _ in range(2))
    for members, packed in trainer.parts(tokens, response_lengths):
        answer = without_gradient(trainer.policy, packed, trainer.settings.temperature)
        for rows, value_R in zip(found, answer, strict=True):
            parts = value_R.split([response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                rows[index] = part
    return found[0], found[1]


def _loss(
    trainer: Trainer, batch: TrainBatch, logp: list[torch.Tensor], entropy: list[torch.Tensor]
) -> Rows:
    training = trainer.settings.training
    old = logp if Corrections.need_old(training) else None
    corrections = Corrections.of(batch, old, training)
    _, reference = trainer.log_probs_before(batch)
    rows: Rows = [[] for _ in logp]
    for part in trainer.steps_of(batch):
        if rows[part[0]]:  # a later epoch
            break
        lengths = [batch.response_lengths[i] for i in part]
        sample_R = torch.repeat_interleave(torch.arange(len(part)), torch.tensor(lengths))
        terms, _ = token_terms(
            torch.cat([logp[i] for i in part]),
            torch.cat([entropy[i] for i in part]),
            sample_R.to(trainer.device),
            trainer.inputs(batch, part, old, reference, corrections),
            trainer.loss_settings(batch, part),
        )
        for index, share in zip(part, terms.loss(training).split(lengths), strict=True):
            rows[index] = share.tolist()
    return rows


def _rows(values: list[torch.Tensor]) -> Rows:
    return [value.tolist() for value in values]
