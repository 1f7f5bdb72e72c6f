"""How much better a sample was than could be expected."""

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
        divide_by_std: False only centres.
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
