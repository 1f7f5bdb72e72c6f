"""Advantages: how much better a sample, or a token, did than expected."""

from __future__ import annotations

import torch


def group_normalize(
    reward_N: torch.Tensor, group_N: torch.Tensor, divide_by_std: bool = True
) -> torch.Tensor:
    """GRPO: a sample's reward against the mean of its prompt's samples, shape (N).

    reward - mean(group), divided by (std(group) + 1e-6) where that std (ddof 1) is above 0. A group
    of one, and a group of equal rewards, get 0. In float64 inside, so that equal rewards give
    exactly 0: in float32 the mean of eight times 0.9 is not 0.9.

    Source: Shao et al., "DeepSeekMath", 2024, section 4.1; without the division, Liu et al.,
    "Understanding R1-Zero-Like Training" (Dr. GRPO), 2025.

    Args:
        reward_N: one reward a sample.
        group_N: which prompt each sample answers; any integers.
        divide_by_std: False only centres (Dr. GRPO, for a loss over a constant length).
    """
    _, group_N = torch.unique(group_N, return_inverse=True)
    groups = int(group_N.max()) + 1 if group_N.numel() else 0
    value_N = reward_N.double()
    count_G = torch.bincount(group_N, minlength=groups).double()
    mean_G = torch.zeros_like(count_G).index_add_(0, group_N, value_N) / count_G
    centred_N = value_N - mean_G[group_N]
    # Equal rewards whose mean is rounded, even in float64, must not look different.
    any_G = torch.zeros_like(count_G).scatter_(0, group_N, value_N)
    differ_G = torch.bincount(group_N, weights=(value_N != any_G[group_N]).double())
    centred_N = torch.where((differ_G == 0)[group_N], 0.0, centred_N)
    if divide_by_std:
        square_G = torch.zeros_like(count_G).index_add_(0, group_N, centred_N.square())
        std_G = (square_G / (count_G - 1).clamp(min=1)).sqrt()
        scale_G = torch.where(std_G > 0, std_G + 1e-6, 1.0)
        centred_N = centred_N / scale_G[group_N]
    floating = reward_N.is_floating_point()  # whole-number rewards have fractional advantages
    return centred_N.to(reward_N.dtype if floating else torch.get_default_dtype())


def leave_one_out(reward_N: torch.Tensor, group_N: torch.Tensor) -> torch.Tensor:
    """RLOO: a sample's reward against the mean of the other samples of its prompt, shape (N).

    reward - (sum(group) - reward) / (n - 1). A group of one has no others and gets 0.

    Source: Ahmadian et al., "Back to Basics: Revisiting REINFORCE Style Optimization", 2024; Kool
    et al., "Buy 4 REINFORCE Samples, Get a Baseline for Free!", 2019.
    """
    _, group_N, count_G = torch.unique(group_N, return_inverse=True, return_counts=True)
    count_N = count_G[group_N].double()
    centred_N = group_normalize(reward_N.double(), group_N, divide_by_std=False)
    # r - (n mean - r) / (n - 1) = (r - mean) n / (n - 1), which is exactly 0 for equal rewards.
    out_N: torch.Tensor = centred_N * count_N / (count_N - 1).clamp(min=1)
    floating = reward_N.is_floating_point()
    return out_N.to(reward_N.dtype if floating else torch.get_default_dtype())


def token_rewards(
    reward_N: torch.Tensor,
    kl_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """Rewards by token, (T): -kl_coef KL on trained ones, plus the sample's reward on its last one.

    Masked tokens get 0. A sample without a trained token loses its reward.

    Args:
        reward_N: one reward a sample.
        kl_T: KL to the reference by token; ignored on masked tokens.
        sample_T: which sample each token belongs to, in order.
        mask_T: 1 where a token is trained on.
        kl_coef: weight of the KL.
    """
    active_T = mask_T != 0
    reward_T = torch.where(active_T, -kl_coef * kl_T, 0.0) if kl_coef else torch.zeros_like(kl_T)
    return reward_T + torch.where(_last(sample_T, active_T), reward_N.to(kl_T.dtype)[sample_T], 0.0)


def reinforce_plus_plus(
    reward_N: torch.Tensor,
    kl_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    kl_coef: float,
    gamma: float,
) -> torch.Tensor:
    """REINFORCE++: the discounted return of each token, G_t = r_t + gamma G_(t+1), shape (T).

    The token rewards are those of `token_rewards`. Masked tokens carry no KL, cost no gamma, and
    get 0. Normalisation over the batch (`whiten`) is a step of its own.

    Source: Hu, "REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models",
    2025.

    Args are those of `token_rewards`; `gamma` is the discount by trained token, in [0, 1].
    """
    reward_T = token_rewards(reward_N, kl_T, sample_T, mask_T, kl_coef)
    return _discounted(reward_T, sample_T, mask_T, gamma)


def reinforce_plus_plus_baseline(
    reward_N: torch.Tensor,
    group_N: torch.Tensor,
    kl_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    kl_coef: float,
) -> torch.Tensor:
    """REINFORCE++ with a baseline: the group-centred reward on every token, minus its KL, (T).

    (reward - mean(group)) - kl_coef KL_t on trained tokens, 0 on the others.

    Source: Hu, "REINFORCE++", 2025, the variant for several samples a prompt.
    """
    centred_N = group_normalize(reward_N, group_N, divide_by_std=False).to(kl_T.dtype)
    value_T = centred_N[sample_T]
    if kl_coef:
        value_T = value_T - kl_coef * kl_T
    return torch.where(mask_T != 0, value_T, 0.0)


def gae(
    value_T: torch.Tensor,
    reward_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    gamma: float,
    lambd: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation over the trained tokens: (advantage_T, return_T).

    delta_t = r_t + gamma V_(t+1) - V_t; A_t = delta_t + gamma lambda A_(t+1); return = A + V, where
    t + 1 is the sample's next trained token: a masked gap neither decays nor breaks the carry.
    After the last one the value is 0, for truncated samples too. Masked tokens get 0.

    Source: Schulman et al., "High-Dimensional Continuous Control Using Generalized Advantage
    Estimation", 2015.

    Args:
        value_T: the critic's value before each token.
        reward_T: reward of each token, as `token_rewards` makes them.
        sample_T: which sample each token belongs to, in order.
        mask_T: 1 where a token is trained on.
        gamma: discount by token.
        lambd: 1 looks to the end of the sample, 0 one token ahead.
    """
    active_T = mask_T != 0
    rows = active_T.nonzero()[:, 0]
    value, sample = value_T[rows].double(), sample_T[rows]
    follows = torch.zeros_like(active_T[rows])  # is the next one of the same sample?
    follows[:-1] = sample[1:] == sample[:-1]
    next_value = torch.zeros_like(value)
    next_value[:-1] = value[1:]
    delta = reward_T[rows].double() + gamma * torch.where(follows, next_value, 0.0) - value
    carried = _discounted(delta, sample, torch.ones_like(sample), gamma * lambd)
    advantage_T = torch.zeros_like(value_T).index_copy(0, rows, carried.to(value_T.dtype))
    return_T = torch.zeros_like(value_T).index_copy(0, rows, (carried + value).to(value_T.dtype))
    return advantage_T, return_T


def whiten(x_T: torch.Tensor, mask_T: torch.Tensor) -> torch.Tensor:
    """Scale to mean 0 and variance 1 over the trained tokens, (T); masked ones are mapped alike.

    (x - mean) / sqrt(var + 1e-8), with the masked mean, and the variance with Bessel's correction
    in a second pass: E[x^2] - E[x]^2 would cancel. Without a trained token nothing changes.

    Args:
        x_T: advantages or rewards.
        mask_T: 1 where a token is trained on.
    """
    value = x_T[mask_T != 0].double()
    if not len(value):
        return x_T
    mean = value.mean()
    variance = (value - mean).square().sum() / max(len(value) - 1, 1)
    return ((x_T.double() - mean) * torch.rsqrt(variance + 1e-8)).to(x_T.dtype)


def _last(sample_T: torch.Tensor, active_T: torch.Tensor) -> torch.Tensor:
    """Mask that is True at each sample's last trained token."""
    rows = active_T.nonzero()[:, 0]
    sample = sample_T[rows]
    ends = torch.ones_like(sample, dtype=torch.bool)
    ends[:-1] = sample[1:] != sample[:-1]
    last_T = torch.zeros_like(active_T)
    last_T[rows[ends]] = True
    return last_T


def _discounted(
    reward_T: torch.Tensor, sample_T: torch.Tensor, mask_T: torch.Tensor, gamma: float
) -> torch.Tensor:
    """G_t = r_t + gamma G_(t+1) over each sample's trained tokens, 0 on the others.

    In float64, from the back, all samples at once: as many steps as the longest has tokens.
    """
    out_T = torch.zeros_like(reward_T, dtype=torch.float64)
    rows = (mask_T != 0).nonzero()[:, 0]
    sample, counts = torch.unique_consecutive(sample_T[rows], return_counts=True)
    ends = counts.cumsum(0)
    carry = torch.zeros(len(sample), dtype=torch.float64, device=reward_T.device)
    for back in range(1, int(counts.max()) + 1 if len(counts) else 1):
        has = counts >= back
        at = rows[(ends - back)[has]]
        carry[has] = reward_T[at].double() + gamma * carry[has]
        out_T[at] = carry[has]
    return out_T.to(reward_T.dtype)
