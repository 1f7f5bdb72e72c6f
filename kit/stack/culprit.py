"""Which sample and which token made an update that had to be refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from kit.stack.fsdp import without_gradient
from kit.stack.policy_loss import token_terms

if TYPE_CHECKING:
    from kit.stack.batches import TrainBatch
    from kit.stack.corrections import Corrections
    from kit.stack.trainer import Trainer


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
