"""Sums, means and differences over packed tokens, shared by the functions that correct ratios."""

from __future__ import annotations

import torch


def token_log_ratio(
    logp_T: torch.Tensor, other_logp_T: torch.Tensor, active_T: torch.Tensor | None = None
) -> torch.Tensor:
    """The difference logp - other_logp, (T) in float64 and without a gradient.

    0 where it is NaN, and where `active_T` is False whatever the values there.
    """
    log_ratio_T = logp_T.detach().double() - other_logp_T.detach().double()
    unknown_T = log_ratio_T.isnan()
    if active_T is not None:
        unknown_T = unknown_T | ~active_T
    return torch.where(unknown_T, 0.0, log_ratio_T)


def sum_by_sample(value_T: torch.Tensor, sample_T: torch.Tensor) -> torch.Tensor:
    """Sum over each sample's tokens, (N) in float64; 0 where infinities of both signs meet."""
    samples = int(sample_T.max()) + 1 if sample_T.numel() else 0
    sum_N = torch.zeros(samples, dtype=torch.float64, device=value_T.device)
    sum_N.index_add_(0, sample_T, value_T.double())
    return torch.where(sum_N.isnan(), 0.0, sum_N)


def mean_where(value: torch.Tensor, where: torch.Tensor, of_none: float) -> torch.Tensor:
    """Mean of the values at `where`, a scalar in float64; `of_none` if that is nowhere."""
    total = torch.where(where, value.double(), 0.0).sum()
    count = where.sum()
    return torch.where(count > 0, total / count.clamp(min=1), of_none)


def as_floats(prefix: str, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalars as numbers, their names prefixed; the device is waited for once."""
    values = torch.stack(list(metrics.values())).tolist()
    return {prefix + name: value for name, value in zip(metrics, values, strict=True)}


def result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """The dtype of what is made of these: float64 if any of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_shapes(**tensors: torch.Tensor) -> None:
    """Refuse tensors that do not have one value each for the same tokens.

    Raises:
        ValueError: naming every tensor and its shape.
    """
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; give each one value for every token")
