"""Corrections for samples that the trained policy did not quite generate itself.

The engine and the trainer compute different log-probabilities for the same tokens (other kernels,
another precision, older weights). These functions weight tokens by how far the two are apart, or
take them out of the loss. Weights carry no gradient: multiply the loss by them.

Everywhere, the log-ratio of a token is train_logp - rollout_logp, computed in float64. Where it is
NaN it counts as 0: a token of which nothing is known is left alone. Masked tokens may hold any
value, NaN and infinity included. Tokens of a sample need not be neighbours.

The helpers at the end (sums, means and differences over packed tokens) are shared with `loss.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

Level = Literal["token", "sequence", "geometric"]
Mode = Literal["truncate", "clip", "mask"]

_LOG_LIMIT = 20.0
"""Log-ratios are clamped to this, once they are aggregated: e^20 is 4.9e8."""


@dataclass(frozen=True, slots=True)
class Rejection:
    """Rejection sampling in `mis`: bounds beyond which a token leaves the loss.

    Raises:
        ValueError: unknown level, bounds that are not 0 <= low <= high, high not above 0.
    """

    level: Level
    """What the ratio is taken of: the token, or its sample's sum or mean of log-ratios."""
    low: float | None = None
    """Below this a token is rejected; None takes the weights' own bound."""
    high: float | None = None
    """Above this a token is rejected; None takes the weights' own bound."""

    def __post_init__(self) -> None:
        _check_choice("rs.level", self.level, get_args(Level))
        low = 0.0 if self.low is None else self.low
        _check_bounds(low, max(low, 1.0) if self.high is None else self.high, "rs.")


def tis(
    train_logp_T: torch.Tensor, rollout_logp_T: torch.Tensor, low: float, high: float
) -> torch.Tensor:
    """Truncated importance sampling: exp(train - rollout) clamped to [low, high], shape (T).

    Source: Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training",
    2025 (fengyao.notion.site/off-policy-rl).

    Args:
        train_logp_T: log-probability of each token under the trainer.
        rollout_logp_T: the same under the engine that sampled it.
        low: the smallest weight; 0 bounds from above only.
        high: the largest weight.

    Returns:
        Weights in float32, or float64 where an argument is; without a gradient.

    Raises:
        ValueError: shapes that differ, bounds that are not 0 <= low <= high, high not above 0.
    """
    check_shapes(train_logp_T=train_logp_T, rollout_logp_T=rollout_logp_T)
    _check_bounds(low, high)
    ratio_T = token_log_ratio(train_logp_T, rollout_logp_T).exp()
    return ratio_T.clamp(low, high).to(result_dtype(train_logp_T, rollout_logp_T))


def mis(
    train_logp_T: torch.Tensor,
    rollout_logp_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    level: Level,
    mode: Mode,
    low: float | None = None,
    high: float = 2.0,
    veto: float | None = None,
    rs: Rejection | None = None,
    batch_normalize: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
    """Masked importance sampling: (weights_T, mask_T, metrics), both tensors of shape (T).

    ratio w = exp(clamp(x, +-20)), where x is the token's log-ratio (`token`), or the sum
    (`sequence`) or mean (`geometric`) of the log-ratios of its sample's active tokens. An infinity
    of each sign in one sample cancel to 0.

    `truncate` weights by min(w, high); `clip` by w moved into [low, high]; `mask` by w itself, and
    tokens with w outside [low, high] leave the mask. Weights are 0 on tokens that were masked to
    begin with; on tokens that leave the mask here they stay. To reduce the loss, keep the
    denominators of the mask that came in: a rejected token counts 0, it does not count others more.

    Source: Liu et al., "When Speed Kills Stability: Demystifying RL Collapse from the
    Training-Inference Mismatch", 2025; the modes and names are Miles'.

    Args:
        train_logp_T: log-probability of each token under the trainer.
        rollout_logp_T: the same under the engine that sampled it.
        sample_T: which sample each token belongs to; the samples are whole.
        mask_T: not 0 where a token is trained on.
        level: what a ratio is taken of.
        mode: what becomes of ratios out of bounds.
        low: the lower bound; None is 1 / high. `truncate` has no use for it.
        high: the upper bound.
        veto: empties the mask of a sample in which the ratio of any single active token (not
            clamped, whatever `level` is) lies below this; None for never.
        rs: rejects more tokens, by bounds and a level of its own, through the mask alone.
        batch_normalize: divides the weights by their mean over the tokens here that were active to
            begin with (`token`), or over the samples with such tokens, each counted once (the other
            levels).

    Returns:
        weights_T: in float32, or float64 where an argument is; without a gradient.
        mask_T: what is left of the mask, in its dtype.
        metrics: `mis/weight_{mean,min,max}` over active tokens, after the bounds and before the
            normalisation (1 where no token is active), `mis/batch_norm` the divisor;
            `mis/truncate_fraction`, `mis/clip_fraction_{low,high}`, `mis/mask_fraction_{low,high}`
            and `mis/rs_fraction` the active tokens out of bounds; `mis/veto_fraction` the samples
            vetoed; `mis/kept_fraction` the active tokens still in the mask. Only what `mode`,
            `rs`, `veto` and `batch_normalize` ask for.

    Raises:
        ValueError: shapes that differ, unknown level or mode, bounds that are not
            0 <= low <= high, high or veto not above 0.
    """
    check_shapes(
        train_logp_T=train_logp_T, rollout_logp_T=rollout_logp_T, sample_T=sample_T, mask_T=mask_T
    )
    low = _checked_low(level, mode, low, high, veto)
    active_T = mask_T != 0
    log_ratio_T = token_log_ratio(train_logp_T, rollout_logp_T, active_T)
    ratio_T = _ratio(log_ratio_T, level, sample_T, active_T)
    weight_T, keep_T, metrics = _bound(ratio_T, active_T, mode, low, high)
    if rs is not None:
        rs_low = low if rs.low is None else rs.low
        rs_high = high if rs.high is None else rs.high
        _check_bounds(rs_low, rs_high, "rs.")
        rs_ratio_T = _ratio(log_ratio_T, rs.level, sample_T, active_T)
        inside_T = (rs_ratio_T >= rs_low) & (rs_ratio_T <= rs_high)
        keep_T = keep_T & inside_T
        metrics["rs_fraction"] = mean_where(~inside_T, active_T, 0.0)
    active_N = sum_by_sample(active_T, sample_T)
    if veto is not None:
        vetoed_N = sum_by_sample((log_ratio_T.exp() < veto) & active_T, sample_T) > 0
        keep_T = keep_T & ~vetoed_N[sample_T]
        metrics["veto_fraction"] = mean_where(vetoed_N, active_N > 0, 0.0)

    weight_A = weight_T[active_T] if active_T.any() else weight_T.new_ones(1)
    metrics |= {
        "weight_mean": weight_A.mean(),
        "weight_min": weight_A.min(),
        "weight_max": weight_A.max(),
        "kept_fraction": mean_where(keep_T, active_T, 1.0),
    }
    if batch_normalize:
        mean = metrics["weight_mean"]
        if level != "token":
            weight_N = sum_by_sample(weight_T * active_T, sample_T) / active_N.clamp(min=1)
            mean = mean_where(weight_N, active_N > 0, 1.0)
        weight_T = weight_T / mean
        metrics["batch_norm"] = mean
    weight_T = torch.where(active_T, weight_T, 0.0).to(result_dtype(train_logp_T, rollout_logp_T))
    return weight_T, mask_T.masked_fill(~keep_T, 0), as_floats("mis/", metrics)


def _checked_low(
    level: Level, mode: Mode, low: float | None, high: float, veto: float | None
) -> float:
    """The lower bound of `mis`, after its settings were checked."""
    _check_choice("level", level, get_args(Level))
    _check_choice("mode", mode, get_args(Mode))
    # A default that is not used cannot be wrong.
    _check_bounds(0.0 if low is None else low, high)
    low = 1.0 / high if low is None else low
    if mode != "truncate":
        _check_bounds(low, high)
    if veto is not None and not 0.0 < veto < math.inf:
        raise ValueError(f"veto {veto} is not a ratio above 0: pass one such as 1e-4, or None")
    return low


def opsm(
    train_logp_T: torch.Tensor,
    old_or_rollout_logp_T: torch.Tensor,
    advantage_T: torch.Tensor,
    sample_T: torch.Tensor,
    mask_T: torch.Tensor,
    delta: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """Off-policy sequence masking: (mask_T, metrics), the mask of shape (T).

    A token leaves the mask if its advantage is below 0 and its sample's
    KL = mean over the sample's active tokens of (old_or_rollout_logp - train_logp) is above
    `delta`. Where a sample has one advantage on all its tokens (GRPO and its kin) that is the whole
    sample or nothing; where advantages differ within a sample (GAE, KL in the reward) its tokens
    with an advantage of 0 or more stay. An infinity of each sign in one sample cancel to 0.

    Source: DeepSeek-AI, "DeepSeek-V3.2", 2025, section 3.1; Miles' `compute_opsm_mask`.

    Args:
        train_logp_T: log-probability of each token under the weights being trained.
        old_or_rollout_logp_T: the same under the policy to compare with: that of the engine, or the
            trainer's at the start of the update.
        advantage_T: each token's advantage.
        sample_T: which sample each token belongs to; the samples are whole.
        mask_T: not 0 where a token is trained on.
        delta: the largest KL, in nats a token, at which a bad sample is still learned from.

    Returns:
        mask_T: what is left of the mask, in its dtype.
        metrics: `opsm/masked_fraction` of active tokens, `opsm/masked_samples` the fraction of
            samples (with active tokens) that lost any, `opsm/kl_mean` over those samples.

    Raises:
        ValueError: shapes that differ, delta below 0.
    """
    check_shapes(
        train_logp_T=train_logp_T,
        old_or_rollout_logp_T=old_or_rollout_logp_T,
        advantage_T=advantage_T,
        sample_T=sample_T,
        mask_T=mask_T,
    )
    if not delta >= 0.0:
        raise ValueError(f"delta {delta} is not a KL of 0 or more: pass one such as 1e-4")
    active_T = mask_T != 0
    log_ratio_T = token_log_ratio(train_logp_T, old_or_rollout_logp_T, active_T)
    active_N = sum_by_sample(active_T, sample_T)
    kl_N = -sum_by_sample(log_ratio_T, sample_T) / active_N.clamp(min=1)
    drop_T = (advantage_T < 0) & (kl_N > delta)[sample_T] & active_T
    dropped_N = sum_by_sample(drop_T, sample_T) > 0
    metrics = {
        "masked_fraction": mean_where(drop_T, active_T, 0.0),
        "masked_samples": mean_where(dropped_N, active_N > 0, 0.0),
        "kl_mean": mean_where(kl_N, active_N > 0, 0.0),
    }
    return mask_T.masked_fill(drop_T, 0), as_floats("opsm/", metrics)


def effective_sample_size(log_ratio: torch.Tensor, mask: torch.Tensor) -> float:
    """Effective sample size as a share of the batch: (sum w)^2 / (n sum w^2), in (0, 1].

    w = exp(log_ratio) over the n active entries. 1 where all weigh the same, 1/n where one
    outweighs all others. Computed relative to the largest w, so that no log-ratio is too large; an
    infinite one stands for its limit (two entries at +inf share everything, -inf weighs nothing).
    NaN counts as 0. No active entry gives 1: weighting has cost nothing, and one empty batch must
    not make a run's mean NaN. Logged as `train/ess_ratio`.

    Source: Kong, "A note on importance sampling using standardized weights", 1992.

    Args:
        log_ratio: log-ratios by token (T) or by sample (N).
        mask: not 0 where an entry counts; the same shape.

    Raises:
        ValueError: shapes that differ.
    """
    check_shapes(log_ratio=log_ratio, mask=mask)
    value_A = log_ratio.detach().double()[mask != 0]
    if value_A.numel() == 0:
        return 1.0
    value_A = torch.where(value_A.isnan(), 0.0, value_A)
    # Infinity minus itself is NaN, but the largest is as large as itself.
    weight_A = torch.where(value_A == value_A.max(), 0.0, value_A - value_A.max()).exp()
    total, squares = float(weight_A.sum()), float(weight_A.square().sum())
    return effective_share(total, squares, value_A.numel())


def effective_share(total: float, squares: float, count: float) -> float:
    """Effective sample size from the sum of the weights and the sum of their squares."""
    return total**2 / (count * squares) if squares else 1.0


def entropy_of(logp: torch.Tensor) -> torch.Tensor:
    """Entropy from log-probs, in nats: shape (...) from (..., V); all of them must be finite."""
    return -(logp.exp() * logp).sum(-1)


def _bound(
    ratio_T: torch.Tensor, active_T: torch.Tensor, mode: Mode, low: float, high: float
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Apply the bounds: (weights, whether a token stays in the mask, metrics)."""
    below_T, above_T = ratio_T < low, ratio_T > high
    share_below, share_above = (mean_where(x, active_T, 0.0) for x in (below_T, above_T))
    keep_T = torch.ones_like(active_T)
    if mode == "truncate":
        return ratio_T.clamp(max=high), keep_T, {"truncate_fraction": share_above}
    metrics = {f"{mode}_fraction_low": share_below, f"{mode}_fraction_high": share_above}
    if mode == "clip":
        return ratio_T.clamp(low, high), keep_T, metrics
    return ratio_T, ~(below_T | above_T), metrics


def _ratio(
    log_ratio_T: torch.Tensor, level: Level, sample_T: torch.Tensor, active_T: torch.Tensor
) -> torch.Tensor:
    """Importance ratio of each token at this level, between e^-20 and e^20."""
    if level != "token":
        value_N = sum_by_sample(log_ratio_T, sample_T)
        if level == "geometric":
            value_N = value_N / sum_by_sample(active_T, sample_T).clamp(min=1)
        log_ratio_T = value_N[sample_T]
    return log_ratio_T.clamp(-_LOG_LIMIT, _LOG_LIMIT).exp()


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is none of {', '.join(known)}")


def _check_bounds(low: float, high: float, owner: str = "") -> None:
    if not 0.0 < high < math.inf:
        raise ValueError(
            f"{owner}high {high} is not a ratio above 0: pass one such as 2.0, or 1e9 for no bound"
        )
    if not 0.0 <= low <= high:
        raise ValueError(
            f"{owner}low {low} is not between 0 and {owner}high {high}: lower {owner}low (0 for no "
            f"bound) or raise {owner}high; unless given, low is 1 / high"
        )


def token_log_ratio(
    logp_T: torch.Tensor, other_logp_T: torch.Tensor, active_T: torch.Tensor | None = None
) -> torch.Tensor:
    """Log-ratio of each token, logp - other_logp, (T) in float64 and without a gradient.

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
    """Mean of the values at `where`, a scalar in float64; `of_none` if `where` is all False."""
    total = torch.where(where, value.double(), 0.0).sum()
    count = where.sum()
    return torch.where(count > 0, total / count.clamp(min=1), of_none)


def as_floats(prefix: str, metrics: dict[str, torch.Tensor]) -> dict[str, float]:
    """Scalar tensors as floats under prefixed names; waits for the device once."""
    values = torch.stack(list(metrics.values())).tolist()
    return {prefix + name: value for name, value in zip(metrics, values, strict=True)}


def result_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Dtype of a result: float64 if any of these tensors is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def check_shapes(**tensors: torch.Tensor) -> None:
    """Refuse tensors that do not have one value each for the same tokens.

    Raises:
        ValueError: naming every tensor and its shape.
    """
    if len({t.shape for t in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items())
        raise ValueError(f"shapes differ: {shapes}; give each one value for every token")
