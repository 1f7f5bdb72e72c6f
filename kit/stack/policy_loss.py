"""The loss of one micro-batch, put together from `kit.algo`, with the metrics that explain it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kit.algo import loss as losses
from kit.algo.kl import approx_kl
from kit.config import TrainingConfig


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The settings, and the totals of the whole optimizer step."""

    training: TrainingConfig
    total_samples: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """What is known of each response token of a micro-batch; all of shape (R)."""

    advantage_R: torch.Tensor
    mask_R: torch.Tensor
    old_logp_R: torch.Tensor | None
    """None where the weights have not moved since the rollout was scored."""
    ref_logp_R: torch.Tensor | None
    rollout_logp_R: torch.Tensor | None


def policy_loss(
    logp_R: torch.Tensor,
    entropy_R: torch.Tensor,
    sample_R: torch.Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
) -> tuple[torch.Tensor, dict[str, float]]:
    """(share of the optimizer step's loss, metrics to be summed over its micro-batches)."""
    training = settings.training
    mask_R = inputs.mask_R
    logp_R, entropy_R = (losses.where_active(x, mask_R) for x in (logp_R, entropy_R))
    old_R = logp_R.detach() if inputs.old_logp_R is None else inputs.old_logp_R
    weight_R = losses.weights(
        mask_R,
        sample_R,
        "token_mean" if training.calculate_per_token_loss else "sample_mean",
        settings.total_samples,
        settings.total_tokens,
    )
    pg_R, clipped_R = losses.ppo_clip(
        logp_R,
        old_R,
        inputs.advantage_R,
        training.eps_clip,
        training.eps_clip_high,
        training.eps_clip_c,
    )
    pg = losses.weighted_sum(pg_R, weight_R)
    entropy = losses.weighted_sum(entropy_R, weight_R)
    loss = pg - training.entropy_coef * entropy
    values = {
        "train/pg_loss": pg,
        "train/entropy_loss": entropy,
        "train/pg_clipfrac": losses.weighted_sum(clipped_R, weight_R),
        "train/ppo_kl": losses.weighted_sum(old_R - logp_R, weight_R),
    }
    if inputs.ref_logp_R is not None:
        ratio_R = (logp_R - old_R).clamp(-20.0, 20.0).exp()
        kl_R = approx_kl(logp_R, inputs.ref_logp_R, training.kl_loss_type, ratio_R)
        kl = losses.weighted_sum(kl_R, weight_R)
        loss = loss + training.kl_loss_coef * kl
        values["train/kl_loss"] = kl
    if inputs.rollout_logp_R is not None:
        gap_R = old_R - inputs.rollout_logp_R
        values["train/train_rollout_logprob_abs_diff"] = losses.weighted_sum(gap_R.abs(), weight_R)
        k3_R = approx_kl(inputs.rollout_logp_R, old_R, "k3")
        values["train/train_rollout_kl"] = losses.weighted_sum(k3_R, weight_R)
    values["train/loss"] = loss
    return loss, {name: float(value.detach()) for name, value in values.items()}
