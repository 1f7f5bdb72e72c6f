"""Policy losses by token, and how token losses become one number."""

from __future__ import annotations

from typing import Literal

import torch

Reduction = Literal["sample_mean", "token_mean", "constant"]


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
    log_ratio_T = finite_log_ratio(logp_T, old_logp_T)
    return _clipped(log_ratio_T, advantage_T, eps_clip, eps_clip_high, eps_clip_c)


def gspo(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
    eps_clip_c: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO: PPO's clipped objective with one ratio a sample, (loss_T, clipped_T), both (T).

    The log-ratio of each token is replaced by its mean over the sample's trained tokens, so that
    the ratio is that of the whole response to the power 1 / length. The gradient reaches every
    trained token through that mean.

    Source: Zheng et al., "Group Sequence Policy Optimization", 2025.

    Args are those of `ppo_clip`, with `sample_T`, the sample of each token, and `mask_T`, 1 where
    one is trained on. Sequence ratios move little: the paper has an `eps_clip` of 3e-4.
    """
    log_ratio_T = where_active(finite_log_ratio(logp_T, old_logp_T), mask_T)
    samples = int(sample_T.max()) + 1 if sample_T.numel() else 0
    total_N = log_ratio_T.new_zeros(samples).index_add(0, sample_T, log_ratio_T)
    count_N = log_ratio_T.new_zeros(samples)
    count_N = count_N.index_add(0, sample_T, (mask_T != 0).to(log_ratio_T.dtype))
    mean_T = (total_N / count_N.clamp(min=1))[sample_T]
    return _clipped(mean_T, advantage_T, eps_clip, eps_clip_high, eps_clip_c)


def cispo(
    logp_T: torch.Tensor,
    old_logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO: -stopgrad(clip(r, 1 - eps_clip, 1 + eps_clip_high)) A logp, (loss_T, clipped_T).

    The importance weight is bounded and no token loses its gradient. `clipped_T` is 1 where the
    ratio was outside.

    Source: MiniMax, "MiniMax-M1", 2025, section 3.1.

    Args are those of `ppo_clip`; an `eps_clip` of 1 leaves the weight open to 0.
    """
    ratio_T = finite_log_ratio(logp_T, old_logp_T).detach().exp()
    high = eps_clip if eps_clip_high is None else eps_clip_high
    bounded_T = ratio_T.clamp(1.0 - eps_clip, 1.0 + high)
    return -bounded_T * advantage_T * logp_T, (bounded_T != ratio_T).to(logp_T.dtype)


def value_clip(
    value_T: torch.Tensor, old_value_T: torch.Tensor, return_T: torch.Tensor, eps: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The critic's loss by token: (loss_T, clipped_T), both (T).

    max((V - R)^2, (clip(V, V_old +- eps) - R)^2) / 2. `clipped_T` is 1 where the clipped term was
    the larger one.

    Source: Schulman et al.'s PPO as published in OpenAI baselines (ppo2), 2017.

    Args:
        value_T: the critic's value now.
        old_value_T: its value when the advantages were computed.
        return_T: the value to learn.
        eps: how far it may move in one update; None does not clip.
    """
    plain_T = (value_T - return_T).square() / 2
    if eps is None:
        return plain_T, torch.zeros_like(plain_T)
    moved_T = old_value_T + (value_T - old_value_T).clamp(-eps, eps)
    bounded_T = (moved_T - return_T).square() / 2
    return torch.maximum(plain_T, bounded_T), (bounded_T > plain_T).to(plain_T.dtype)


def finite_log_ratio(logp_T: torch.Tensor, old_logp_T: torch.Tensor) -> torch.Tensor:
    """The log-ratio logp - old_logp, (T), clamped to +-20; NaN (inf - inf) counts as 0."""
    log_ratio_T = logp_T - old_logp_T
    return torch.where(log_ratio_T.isnan(), 0.0, log_ratio_T).clamp(-20.0, 20.0)


def _clipped(
    log_ratio_T: torch.Tensor,
    advantage_T: torch.Tensor,
    eps_clip: float,
    eps_clip_high: float | None,
    eps_clip_c: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
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
    constant_length: int = 1,
) -> torch.Tensor:
    """Weight of each token in the batch's loss, (T) in float64; `weighted_sum` reduces with it.

    `sample_mean`: 1 / (active tokens of its sample, at least 1) / (samples of the whole batch).
    `token_mean`: 1 / (active tokens of the whole batch). `constant`: 1 / constant_length / (samples
    of the whole batch), so that a long sample counts more (Dr. GRPO). Masked tokens count 0. The
    totals are those of the whole batch, not of a micro-batch or of one trainer: that is what makes
    the result independent of how samples were packed.

    Args:
        mask_T: 1 where a token is trained on.
        sample_T: which sample each token belongs to; the samples of a micro-batch are whole.
        how: `sample_mean`, `token_mean` or `constant`.
        total_samples: samples of the batch, fully masked ones included.
        total_tokens: active tokens of the batch.
        constant_length: what `constant` divides by: the longest that a response can be.

    Raises:
        ValueError: `how` is none of them.
    """
    active_T = mask_T.double()
    if how == "token_mean":
        return active_T / max(total_tokens, 1)
    if how == "constant":
        return active_T / constant_length / total_samples
    if how != "sample_mean":
        raise ValueError(f"reduction {how!r} is none of sample_mean, token_mean, constant")
    # There are no more samples than tokens; asking how many would wait for the device.
    count_N = torch.zeros(len(sample_T), dtype=torch.float64, device=mask_T.device)
    count_N.index_add_(0, sample_T, active_T)
    return active_T / count_N.clamp(min=1)[sample_T] / total_samples


def weighted_sum(value_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """Sum of value * weight over the tokens whose weight is not 0; a NaN elsewhere is harmless."""
    return weighted(value_T, weight_T).sum()


def weighted(value_T: torch.Tensor, weight_T: torch.Tensor) -> torch.Tensor:
    """Each token's contribution to `weighted_sum`, (T)."""
    return torch.where(weight_T == 0, 0.0, value_T) * weight_T.to(value_T.dtype)


def where_active(value_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Values of trained tokens, with 0 and no gradient on the others.

    Used on the log-probs that enter a loss. `weighted_sum` leaves a NaN or infinity on a masked
    token out of the value, but the gradient would meet it on its way back (0 * inf = NaN).
    """
    return torch.where(mask_T == 0, 0.0, value_T)
