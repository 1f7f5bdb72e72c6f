"""Losses of one micro-batch, put together from `kit.algo`, with the metrics that explain them.

Corrections are worked out once an update, from the log-probs at its beginning: sequence levels,
vetoes and normalised weights look at more than a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kit.algo import loss as losses
from kit.algo.corrections import Rejection, effective_share, mis, opsm, tis
from kit.algo.kl import approx_kl
from kit.algo.own_loss import LossFunction, token_loss
from kit.config import MisConfig, TrainingConfig
from kit.errors import StackError
from kit.messages import TrainBatch
from kit.models.packing import Packed, to_device
from kit.trainer.batch import flat, flat_advantages

ESS = ("ess/weights", "ess/squares", "ess/tokens")
"""Sums over the tokens of an optimizer step, of which `finish` makes train/ess_ratio."""


@dataclass(frozen=True, slots=True)
class LossSettings:
    """The settings, and the totals of the whole optimizer step."""

    training: TrainingConfig
    total_samples: int
    total_tokens: int
    constant_length: int = 1
    """What dr_grpo divides by: the longest that a response can be."""
    own: LossFunction | None = None
    """In place of the estimator's loss."""

    def weights(self, mask_R: torch.Tensor, sample_R: torch.Tensor) -> torch.Tensor:
        """Weight of each token in the loss."""
        how: losses.Reduction = "sample_mean"
        if self.training.advantage_estimator == "dr_grpo":
            how = "constant"
        elif self.training.calculate_per_token_loss:
            how = "token_mean"
        totals = (self.total_samples, self.total_tokens, self.constant_length)
        return losses.weights(mask_R, sample_R, how, *totals)


@dataclass(frozen=True, slots=True)
class TokenInputs:
    """Inputs of the loss by response token of a micro-batch, all of shape (R)."""

    advantage_R: torch.Tensor
    mask_R: torch.Tensor
    old_logp_R: torch.Tensor | None
    """None where the weights have not moved since the rollout was scored."""
    ref_logp_R: torch.Tensor | None
    rollout_logp_R: torch.Tensor | None
    weight_R: torch.Tensor | None = None
    """Importance weights that were worked out for the whole batch."""
    keep_R: torch.Tensor | None = None
    """0 where a correction leaves a token out of the policy loss."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Loss terms by token of an optimizer step, all of shape (R)."""

    pg_R: torch.Tensor
    entropy_R: torch.Tensor
    kl_R: torch.Tensor | None
    """None without a reference."""

    def loss(self, training: TrainingConfig) -> torch.Tensor:
        """Each token's contribution to the loss, (R); the sum is `policy_loss`."""
        return _total(self.pg_R, self.entropy_R, self.kl_R, training)


def policy_loss(
    logp_R: torch.Tensor,
    entropy_R: torch.Tensor,
    sample_R: torch.Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(share of the optimizer step's loss, metrics to be summed over its micro-batches)."""
    terms, values = token_terms(logp_R, entropy_R, sample_R, inputs, settings)
    pg, entropy = terms.pg_R.sum(), terms.entropy_R.sum()
    kl = None if terms.kl_R is None else terms.kl_R.sum()
    loss = _total(pg, entropy, kl, settings.training)
    values |= {"train/pg_loss": pg, "train/entropy_loss": entropy, "train/loss": loss}
    if kl is not None:
        values["train/kl_loss"] = kl
    return loss, {name: value.detach() for name, value in values.items()}


def _total(
    pg: torch.Tensor, entropy: torch.Tensor, kl: torch.Tensor | None, training: TrainingConfig
) -> torch.Tensor:
    loss = pg
    if training.entropy_coef:  # 0 times it would have its gradient worked out for nothing
        loss = loss - training.entropy_coef * entropy
    return loss if kl is None else loss + training.kl_loss_coef * kl


def value_loss(
    value_R: torch.Tensor,
    old_value_R: torch.Tensor,
    return_R: torch.Tensor,
    weight_R: torch.Tensor,
    value_clip: float | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(share of the critic's loss, metrics to be summed over micro-batches).

    Args:
        value_R: what the critic expects now.
        old_value_R: what it expected when the advantages were made.
        return_R: what it should have expected.
        weight_R: what each token counts in the loss of the optimizer step.
        value_clip: how far a value may move; None does not clip.
    """
    loss_R, clipped_R = losses.value_clip(value_R, old_value_R, return_R, value_clip)
    loss = losses.weighted_sum(loss_R, weight_R)
    values = {
        "train/value_loss": loss,
        "train/value_clipfrac": losses.weighted_sum(clipped_R, weight_R),
        "train/value_mean": losses.weighted_sum(value_R, weight_R),
        "train/return_mean": losses.weighted_sum(return_R, weight_R),
    }
    return loss, {name: value.detach() for name, value in values.items()}


def draft_loss(
    loss_R: torch.Tensor, tokens: int, *, counts: bool, factor: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """(share of the draft's loss, metrics to be summed over micro-batches): a mean over tokens.

    Args:
        loss_R: cross-entropy of each token under the draft, or KL to the policy's distribution.
        tokens: of the optimizer step, over all ranks.
        counts: False for a micro-batch that only keeps other ranks company.
        factor: on the share, and not on the metric.
    """
    loss = loss_R.sum() * (float(counts) / max(tokens, 1))
    return factor * loss, {"train/draft_loss": loss.detach()}


def token_terms(
    logp_R: torch.Tensor,
    entropy_R: torch.Tensor,
    sample_R: torch.Tensor,
    inputs: TokenInputs,
    settings: LossSettings,
) -> tuple[Terms, dict[str, torch.Tensor]]:
    """(the loss token by token, metrics that are no part of it)."""
    training = settings.training
    mask_R = inputs.mask_R
    logp_R, entropy_R = (losses.where_active(x, mask_R) for x in (logp_R, entropy_R))
    trainer_R = logp_R.detach() if inputs.old_logp_R is None else inputs.old_logp_R
    old_R = trainer_R
    if training.use_rollout_logprobs and inputs.rollout_logp_R is not None:
        old_R = inputs.rollout_logp_R
    weight_R = settings.weights(mask_R, sample_R)
    # Tokens that a correction leaves out leave the sum, not what it is divided by.
    kept_R = weight_R
    if inputs.keep_R is not None:
        kept_R = weight_R * losses.where_active(inputs.keep_R, mask_R)
    values: dict[str, torch.Tensor] = {}
    if settings.own is None:
        pg_R, clipped_R = _surrogate(logp_R, old_R, inputs.advantage_R, sample_R, mask_R, training)
        values["train/pg_clipfrac"] = losses.weighted_sum(clipped_R, kept_R)
    else:
        given = _own_inputs(logp_R, old_R, entropy_R, sample_R, inputs)
        pg_R, own = token_loss(settings.own, given)
        for name, value_R in own.items():
            values[f"train/own/{name}"] = losses.weighted_sum(value_R, weight_R)
    if training.use_tis and inputs.rollout_logp_R is not None:
        low, high = training.tis_clip_low, training.tis_clip
        tis_R = tis(trainer_R, inputs.rollout_logp_R, low, high)
        pg_R = pg_R * tis_R
        values["train/tis"] = losses.weighted_sum(tis_R, weight_R)
        at_bound_R = ((tis_R >= high) | (tis_R <= low)).to(tis_R.dtype)
        values["train/tis_clipfrac"] = losses.weighted_sum(at_bound_R, weight_R)
    if inputs.weight_R is not None:
        pg_R = pg_R * inputs.weight_R
    values["train/ppo_kl"] = losses.weighted_sum(old_R - logp_R, kept_R)
    kl_R = None
    if inputs.ref_logp_R is not None:
        ratio_R = losses.finite_log_ratio(logp_R, old_R).exp()
        kl_R = approx_kl(logp_R, inputs.ref_logp_R, training.kl_loss_type, ratio_R)
        kl_R = losses.weighted(kl_R, weight_R)
    behind_R = old_R
    if inputs.rollout_logp_R is not None:
        behind_R = inputs.rollout_logp_R
        gap_R = trainer_R - behind_R
        values["train/train_rollout_logprob_abs_diff"] = losses.weighted_sum(gap_R.abs(), weight_R)
        k3_R = approx_kl(behind_R, trainer_R, "k3")
        values["train/train_rollout_kl"] = losses.weighted_sum(k3_R, weight_R)
    ratio_R = losses.finite_log_ratio(logp_R.detach(), behind_R).double().exp() * (mask_R != 0)
    values |= dict(zip(ESS, (ratio_R.sum(), ratio_R.square().sum(), mask_R.sum()), strict=True))
    terms = Terms(losses.weighted(pg_R, kept_R), losses.weighted(entropy_R, weight_R), kl_R)
    return terms, values


def _own_inputs(
    logp_R: torch.Tensor,
    old_R: torch.Tensor,
    entropy_R: torch.Tensor,
    sample_R: torch.Tensor,
    inputs: TokenInputs,
) -> dict[str, torch.Tensor | None]:
    """Inputs of an own loss function, by the names of its parameters; nothing on masked tokens."""

    def active(value_R: torch.Tensor | None) -> torch.Tensor | None:
        return None if value_R is None else losses.where_active(value_R, inputs.mask_R)

    return {
        "logp_T": logp_R,
        "old_logp_T": active(old_R),
        "advantage_T": active(inputs.advantage_R),
        "entropy_T": entropy_R,
        "mask_T": inputs.mask_R,
        "sample_T": sample_R,
        "rollout_logp_T": active(inputs.rollout_logp_R),
        "ref_logp_T": active(inputs.ref_logp_R),
    }


def _surrogate(
    logp_R: torch.Tensor,
    old_R: torch.Tensor,
    advantage_R: torch.Tensor,
    sample_R: torch.Tensor,
    mask_R: torch.Tensor,
    training: TrainingConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator's loss by token, and which tokens it clipped."""
    low, high = training.eps_clip, training.eps_clip_high
    if training.advantage_estimator == "gspo":
        return losses.gspo(
            logp_R, old_R, advantage_R, sample_R, mask_R, low, high, training.eps_clip_c
        )
    if training.advantage_estimator == "cispo":
        return losses.cispo(logp_R, old_R, advantage_R, low, high)
    return losses.ppo_clip(logp_R, old_R, advantage_R, low, high, training.eps_clip_c)


ROUTED_ROWS = "routed_rows"
ROUTING = (
    "train/routing/overlap",
    "train/routing/changed_frac",
    "train/routing/contradicted_frac",
)


def routing_sums(packed: Packed, *, counts: bool) -> dict[str, torch.Tensor]:
    """Sums over the rows of a pass of how its routers agree with a record; none without one."""
    table = packed.experts
    if table is None:
        return {}
    share, changed, rows = table.agreement()
    layers = table.given_TLK.shape[1]
    contradicted = torch.full_like(rows, packed.contradictions / layers)
    values = zip((*ROUTING, ROUTED_ROWS), (share, changed, contradicted, rows), strict=True)
    return {name: value * float(counts) for name, value in values}


def finish(sums: dict[str, float]) -> dict[str, float]:
    """The metrics of an optimizer step from the sums over its micro-batches.

    The effective sample size is that of the tokens, weighted by the probability ratio of the
    weights being trained to those that wrote the samples.
    """
    skipped = {*ESS, ROUTED_ROWS}
    metrics = {name: value for name, value in sums.items() if name not in skipped}
    for name in ROUTING:
        if name in metrics:
            metrics[name] /= max(sums[ROUTED_ROWS], 1.0)
    metrics["train/ess_ratio"] = effective_share(*(sums.get(name, 0.0) for name in ESS))
    return metrics


@dataclass(frozen=True, slots=True)
class Corrections:
    """Importance weights and rejections by sample; None where nothing is corrected."""

    weights: tuple[torch.Tensor, ...] | None = None
    keep: tuple[torch.Tensor, ...] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def need_old(training: TrainingConfig) -> bool:
        """Whether they need the trainer's log-probs from before the update."""
        return training.mis is not None or training.opsm_delta is not None

    @classmethod
    def of(
        cls, batch: TrainBatch, old: Sequence[torch.Tensor] | None, training: TrainingConfig
    ) -> Corrections:
        """Compute the corrections of a whole batch.

        Raises:
            StackError: a correction is set, but the samples have no log-probs from the engine.
        """
        needs_old = cls.need_old(training)
        wanted = needs_old or training.use_tis or training.use_rollout_logprobs
        if wanted and batch.rollout_log_probs is None:
            raise StackError(
                "The samples have no rollout_log_probs, which use_tis, mis, opsm_delta and "
                "use_rollout_logprobs compare with.",
                fix="train on samples that the engine wrote, or leave these settings out.",
            )
        if old is None or batch.rollout_log_probs is None or not needs_old:
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
            weight_T, kept_T, report = _mis(train_T, rollout_T, sample_T, mask_T, training.mis)
            keep_T, metrics = keep_T * kept_T, metrics | report
        if training.opsm_delta is not None:
            advantage_T = flat_advantages(batch, everyone).to(device)
            kept_T, report = opsm(
                train_T, rollout_T, advantage_T, sample_T, mask_T, training.opsm_delta
            )
            keep_T, metrics = keep_T * kept_T, metrics | report
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


@dataclass(frozen=True, slots=True)
class ScoredBatch:
    """A batch with what the networks said of it before the update, by sample."""

    batch: TrainBatch
    old: list[torch.Tensor] | None
    """The policy's log-probs; None where the weights have not moved since."""
    reference: list[torch.Tensor] | None
    corrections: Corrections

    def inputs(
        self, indices: Sequence[int], device: torch.device, *, counts: bool = True
    ) -> TokenInputs:
        """Inputs of the loss by response token of these samples; `counts` False masks them all."""
        batch = self.batch
        mask = flat(batch.loss_masks, indices)
        rollout = None
        if batch.rollout_log_probs is not None:
            rollout = to_device(flat(batch.rollout_log_probs, indices), device)
        weight, keep = self.corrections.of_samples(indices)
        return TokenInputs(
            advantage_R=to_device(flat_advantages(batch, indices), device),
            mask_R=to_device(mask if counts else torch.zeros_like(mask), device),
            old_logp_R=torch.cat([self.old[i] for i in indices]) if self.old else None,
            ref_logp_R=torch.cat([self.reference[i] for i in indices]) if self.reference else None,
            rollout_logp_R=rollout,
            weight_R=weight,
            keep_R=keep,
        )


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
