"""Policy losses by token, and how token losses become one number."""

from __future__ import annotations

from typing import Literal

import torch

Reduction = Literal["sample_mean", "token_mean"]


def ppo_clip(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """PPO's clipped objective as a loss: (loss_T, clipped_T), both of shape (T).

    ratio r = exp(clamp(logp - old_logp, +-20)), a NaN log-ratio counting as 0;
    loss = max(-r A, -clip(r, 1 - eps_clip, 1 + eps_clip_high) A). With `eps_clip_c` (dual clip) the
    loss of a negative advantage is at most -eps_clip_c A. `clipped_T` is 1 where the clipped term
    was the larger one.

    Source: Schulman et al., "Proximal Policy Optimization", 2017; the separate upper bound, Yu et
    al., "DAPO", 2025; dual clip, Ye et al., "Mastering Complex Control in MOBA Games", 2020.

    Args:
        logp_T: log-probability of each token under the weights being trained.
        old_logp_T: the same under the weights the update began with.
        advantage_T: each token's advantage.
        eps_clip: how far below 1 the ratio counts.
        eps_clip_high: how far above 1; None takes `eps_clip`.
        eps_clip_c: None leaves negative advantages unbounded.
    """
    log_ratio_T = logp_T - old_logp_T
    log_ratio_T = torch.where(log_ratio_T.isnan(), 0.0, log_ratio_T).clamp(-20.0, 20.0)
    ratio_T = log_ratio_T.exp()
    high = eps_clip if eps_clip_high is None else eps_clip_high
    plain_T = -ratio_T * advantage_T
    bounded_T = -ratio_T.clamp(1.0 - eps_clip, 1.0 + high) * advantage_T
    loss_T = torch.maximum(plain_T, bounded_T)
    clipped_T = (bounded_T > plain_T).to(loss_T.dtype)
    if eps_clip_c is not None:
        floor_T = torch.minimum(loss_T, -eps_clip_c * advantage_T)
        loss_T = torch.where(advantage_T < 0, floor_T, loss_T)
    return loss_T, clipped_T


def weights(
    mask_T: torch.Tensor,
    sample_T: torch.Tensor,
    how: Reduction,
    total_samples: int,
    total_tokens: int,
) -> torch.Tensor:
    """What each token counts in the batch's loss, (T) in float64; `weighted_sum` reduces with it.

    `sample_mean`: 1 / (active tokens of its sample, at least 1) / (samples of the whole batch).
    `token_mean`: 1 / (active tokens of the whole batch). Masked tokens count 0. The totals are
    those of the whole batch, not of a micro-batch or of one trainer: that is what makes the result
    independent of how samples were packed.

    Args:
        mask_T: 1 where a token is trained on.
        sample_T: which sample each token belongs to; the samples of a micro-batch are whole.
        how: `sample_mean` or `token_mean`.
        total_samples: samples of the batch, fully masked ones included.
        total_tokens: active tokens of the batch.

    Raises:
        ValueError: `how` is neither.
    """
    active_T = mask_T.double()
    if how == "token_mean":
        return active_T / max(total_tokens, 1)
    if how != "sample_mean":
        raise ValueError(f"reduction {how!r} is neither sample_mean nor token_mean")
    samples = int(sample_T.max()) + 1 if sample_T.numel() else 0
    count_N = torch.zeros(samples, dtype=torch.float64, device=mask_T.device)
    count_N.index_add_(0, sample_T, active_T)
    return active_T / count_N.clamp(min=1)[sample_T] / total_samples


def reduce(
    loss_T: torch.Tensor, mask_T: torch.Tensor, sample_T: torch.Tensor, how: Reduction
) -> torch.Tensor:
    """The loss of a batch that is all here: a scalar. Values on masked tokens are ignored.

    Args and errors are those of `weights`.
    """
    samples = int(sample_T.max()) + 1 if sample_T.numel() else 0
    weight_T = weights(mask_T, sample_T, how, max(samples, 1), int(mask_T.sum()))
    return weighted_sum(loss_T, weight_T)


def weighted_sum(value_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """Sum of value * weight over the tokens whose weight is not 0; a NaN elsewhere is harmless."""
    return (torch.where(weight_T == 0, 0.0, value_T) * weight_T.to(value_T.dtype)).sum()


def where_active(value_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """The values of trained tokens, and 0 on the others, through which no gradient flows.

    For the log-probs that a loss is made of. `weighted_sum` leaves a NaN or infinity on a masked
    token out of the value, but the gradient would meet it on its way back (0 * inf = NaN).
    """
    return torch.where(mask_T == 0, 0.0, value_T)
