"""What the whole batch says about each token before an update: weights, and who is left out.

Sequence levels, vetoes and normalised weights look at more than a micro-batch, so they are worked
out once, from the log-probs at the beginning of the update.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kit.algo.corrections import Rejection, mis, opsm
from kit.config import MisConfig, TrainingConfig
from kit.errors import StackError
from kit.stack.batches import TrainBatch, flat


@dataclass(frozen=True, slots=True)
class Corrections:
    """By sample; None where nothing is corrected."""

    weights: tuple[torch.Tensor, ...] | None = None
    keep: tuple[torch.Tensor, ...] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def need_old(training: TrainingConfig) -> bool:
        """Do they need the trainer's log-probs from before the update?"""
        return training.mis is not None or training.opsm_delta is not None

    @classmethod
    def of(
        cls, batch: TrainBatch, old: Sequence[torch.Tensor] | None, training: TrainingConfig
    ) -> Corrections:
        """Work them out.

        Raises:
            StackError: a correction is set, but the samples have no log-probs from the engine.
        """
        settings = (training.mis, training.opsm_delta)
        wanted = (
            training.use_tis
            or training.use_rollout_logprobs
            or any(setting is not None for setting in settings)
        )
        if wanted and batch.rollout_log_probs is None:
            raise StackError(
                "The samples have no rollout_log_probs, which use_tis, mis, opsm_delta and "
                "use_rollout_logprobs compare with.",
                fix="train on samples that the engine wrote, or leave these settings out.",
            )
        if old is None or batch.rollout_log_probs is None or not cls.need_old(training):
            return cls()
        everyone = range(len(batch))
        train_T = torch.cat(list(old))
        device = train_T.device
        rollout_T = flat(batch.rollout_log_probs, everyone).to(device)
        mask_T = flat(batch.loss_masks, everyone).to(device)
        sample_T = torch.repeat_interleave(
            torch.arange(len(batch)), torch.tensor(batch.response_lengths)
        ).to(device)
        keep_T, weight_T, metrics = mask_T, None, dict[str, float]()
        if training.mis is not None:
            weight_T, kept_T, found = _mis(train_T, rollout_T, sample_T, mask_T, training.mis)
            keep_T, metrics = keep_T * kept_T, metrics | found
        if training.opsm_delta is not None:
            advantage_T = batch.flat_advantages(everyone).to(device)
            kept_T, found = opsm(
                train_T, rollout_T, advantage_T, sample_T, mask_T, training.opsm_delta
            )
            keep_T, metrics = keep_T * kept_T, metrics | found
        lengths = batch.response_lengths
        return cls(
            weights=None if weight_T is None else weight_T.split(lengths),
            keep=keep_T.split(lengths),
            metrics={f"train/{name}": value for name, value in metrics.items()},
        )

    def of_samples(self, indices: Sequence[int]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Weight and 0 or 1 of each response token of these samples."""
        weight, keep = (
            None if rows is None else torch.cat([rows[i] for i in indices])
            for rows in (self.weights, self.keep)
        )
        return weight, keep


def _mis(
    train_T: torch.Tensor,
    rollout_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    config: MisConfig,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    rejection = None
    if config.rs_level:
        rejection = Rejection(config.rs_level, config.rs_low, config.rs_high)
    return mis(
        train_T,
        rollout_T,
        sample_T,
        mask_T,
        config.level,
        config.mode,
        low=config.low,
        high=config.high,
        veto=config.veto,
        rs=rejection,
        batch_normalize=config.batch_normalize,
    )
