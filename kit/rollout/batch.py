"""Turns a scored rollout into a training batch, and an update into a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, get_args

from kit.config import RolloutConfig, TrainingConfig
from kit.config.training import COMPARES_A_GROUP, Estimator
from kit.errors import ConfigError, SessionError, did_you_mean
from kit.reports import Metrics, UpdateReport
from kit.rewards.runner import failure_summary
from kit.samples import Batch, Rollout, Sample, Status
from kit.samples.token_values import trained_mean

if TYPE_CHECKING:
    import torch

    from kit.messages import ExpertRecords
    from kit.stack.stack import Stack


PER_SAMPLE = COMPARES_A_GROUP - {"reinforce_plus_plus_baseline"}
"""Estimators that give all tokens of a sample the same advantage."""

ByToken = Callable[[Sequence[Sample], str], list[list[float]]]
"""Asks the trainer for a number a response token: (samples, `policy|reference|values`)."""
Advantage = Callable[[Rollout], Any]
"""Advantages of the samples of a rollout: N numbers, or N rows with a number a response token."""


def with_estimator(training: TrainingConfig, estimator: Estimator | None) -> TrainingConfig:
    """Settings with another estimator; None keeps it. Raises ConfigError for an unknown one."""
    if estimator is None:
        return training
    if estimator not in (known := get_args(Estimator)):
        raise ConfigError(
            f"There is no advantage_estimator {estimator!r}.", fix=did_you_mean(estimator, known)
        )
    # Settings of other estimators do no harm here, so they are not checked again.
    return training.model_copy(update={"advantage_estimator": estimator})


def make_batch(
    rollout: Rollout,
    training: TrainingConfig,
    ask: ByToken,
    chosen: Estimator | Advantage | None = None,
) -> Batch:
    """Make a batch: advantages by `training.advantage_estimator`, or by what is chosen instead.

    Args:
        rollout: with rewards.
        training: estimator and coefficients.
        ask: for log-probs and values, where the estimator needs them.
        chosen: another estimator, or a function that makes the advantages.

    Raises:
        SessionError: a sample has no reward yet, or the function returned something else.
    """
    own = chosen if callable(chosen) else None
    training = with_estimator(training, None if callable(chosen) else chosen)
    samples, left_out = trainable(rollout, training)
    if not samples:
        return Batch((), (), rollout.step, left_out)
    lengths = [s.response_length for s in samples]
    per_sample, whitens = training.advantage_estimator in PER_SAMPLE, training.whitens
    if own is None:
        values = ask(samples, "values") if training.advantage_estimator == "ppo" else None
        advantage_T, return_T = _advantages(samples, training, ask, values)
    else:
        values = return_T = None
        advantage_T, per_sample = _by_function(own, rollout.with_samples(samples))
        whitens = bool(training.normalize_advantages)
    if whitens:
        from kit.algo.advantages import whiten

        advantage_T = whiten(advantage_T, _masks(samples))
    by_token: list[list[float]] | None = None
    if per_sample:
        # One token tells for its sample, and a rollout of a GPU has a hundred thousand.
        firsts = advantage_T[[0, *accumulate(lengths[:-1])]].tolist()
        means = [value * any(s.mask) for value, s in zip(firsts, samples, strict=True)]
    else:
        by_token = _by_sample(advantage_T, lengths)
        means = [trained_mean(row, s.mask) for row, s in zip(by_token, samples, strict=True)]
    return Batch(
        samples,
        tuple(means),
        rollout.step,
        left_out,
        token_advantages=_as_tuples(by_token),
        values=_as_tuples(values),
        returns=None if return_T is None else _as_tuples(_by_sample(return_T, lengths)),
    )


def trainable(
    rollout: Rollout, training: TrainingConfig
) -> tuple[tuple[Sample, ...], tuple[str, ...]]:
    """Samples that can train, and why groups were left out."""
    samples: list[Sample] = []
    left_out: list[str] = []
    for group in rollout.groups():
        bad = [s for s in group if s.status in (Status.FAILED, Status.ABORTED)]
        if not bad and any(s.reward is None for s in group):
            raise SessionError(
                "The rollout has no rewards.", fix="call `rollout = session.score(rollout)`."
            )
        if bad:
            why = failure_summary(bad) or [f"{len(bad)} aborted"]
            left_out.append(f"group {group[0].group_index}: {'; '.join(why)}")
        else:
            samples += [s for s in group if s.response_length]
    return tuple(samples), tuple(left_out)


def _advantages(
    samples: Sequence[Sample],
    training: TrainingConfig,
    ask: ByToken,
    values: list[list[float]] | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By response token, (T): advantages before whitening, and returns where there are values."""
    import torch

    from kit.algo import advantages

    estimator, kl_coef = training.advantage_estimator, training.kl_coef
    reward_N = torch.tensor([s.reward for s in samples], dtype=torch.float64)
    group_N = torch.tensor([s.group_index for s in samples], dtype=torch.int64)
    mask_T, sample_T = _masks(samples), _sample_of_token(samples)
    kl_T = _kl(samples, training, ask)
    if values is not None:
        value_T = torch.tensor([x for row in values for x in row], dtype=torch.float64)
        reward_T = advantages.token_rewards(reward_N, kl_T, sample_T, mask_T, kl_coef)
        return advantages.gae(value_T, reward_T, sample_T, mask_T, training.gamma, training.lambd)
    if kl_coef and estimator in PER_SAMPLE:
        # One number a sample: the KL of the whole response.
        total_N = torch.zeros_like(reward_N).index_add_(0, sample_T, kl_T * mask_T)
        reward_N = reward_N - kl_coef * total_N
    if estimator == "reinforce_plus_plus":
        advantage_T = advantages.reinforce_plus_plus(
            reward_N, kl_T, sample_T, mask_T, kl_coef, training.gamma
        )
    elif estimator == "reinforce_plus_plus_baseline":
        advantage_T = advantages.reinforce_plus_plus_baseline(
            reward_N, group_N, kl_T, sample_T, mask_T, kl_coef
        )
    elif estimator == "rloo":
        advantage_T = advantages.leave_one_out(reward_N, group_N)[sample_T]
    else:
        divide = training.grpo_std_normalization and estimator != "dr_grpo"
        advantage_T = advantages.group_normalize(reward_N, group_N, divide)[sample_T]
    return advantage_T, None


def _by_function(own: Advantage, rollout: Rollout) -> tuple[torch.Tensor, bool]:
    """(advantages by response token, (T); whether those of a sample are alike) of a function.

    Raises:
        SessionError: it returned other than a number, or a number for each token, for each sample.
    """
    import torch

    given = own(rollout)
    rows = given.tolist() if hasattr(given, "tolist") else list(given)
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in rows]
    by_token = bool(rows) and isinstance(rows[0], (list, tuple))
    wanted = [s.response_length if by_token else 1 for s in rollout]
    found = [len(row) if isinstance(row, (list, tuple)) else 1 for row in rows]
    if found != wanted:
        what = "rows, one a sample," if by_token else "numbers"
        raise SessionError(
            f"The advantage function returned {len(rows)} {what} for {len(rollout)} samples"
            + (", and rows of other lengths than the responses." if by_token else "."),
            fix="return one number a sample, or one list a sample with a number for each token of "
            "its response (`sample.response_length`).",
        )
    flat = [x for row in rows for x in row] if by_token else rows
    value_T = torch.tensor(flat, dtype=torch.float64)
    if not value_T.isfinite().all():
        raise SessionError(
            "The advantage function returned a number that is not finite.",
            fix="return 0 for samples that are not to train.",
        )
    return (value_T if by_token else value_T[_sample_of_token(rollout)]), not by_token


def _by_sample(value_T: torch.Tensor, lengths: list[int]) -> list[list[float]]:
    return [part.tolist() for part in value_T.split(lengths)]


def _as_tuples(rows: list[list[float]] | None) -> tuple[tuple[float, ...], ...] | None:
    return None if rows is None else tuple(map(tuple, rows))


def _masks(samples: Sequence[Sample]) -> torch.Tensor:
    import torch

    return torch.tensor([m for s in samples for m in s.mask], dtype=torch.float64)


def _sample_of_token(samples: Sequence[Sample]) -> torch.Tensor:
    import torch

    lengths = torch.tensor([s.response_length for s in samples])
    return torch.repeat_interleave(torch.arange(len(samples)), lengths)


def _kl(samples: Sequence[Sample], training: TrainingConfig, ask: ByToken) -> torch.Tensor:
    """KL of the policy to the reference by token, (T); zeros where it has no weight."""
    import torch

    from kit.algo.kl import approx_kl

    if not training.kl_coef:
        return torch.zeros(sum(s.response_length for s in samples), dtype=torch.float64)
    policy_T, reference_T = (
        torch.tensor([x for row in ask(samples, of) for x in row], dtype=torch.float64)
        for of in ("policy", "reference")
    )
    return approx_kl(policy_T, reference_T, training.kl_loss_type)


def check_sampling(
    samples: Sequence[Sample], rollout: RolloutConfig, training: TrainingConfig
) -> None:
    """Refuse samples of another distribution than the one that the trainer computes.

    Those of another temperature are weighed where a correction compares both sides' log-probs.
    After top_p or top_k, the engine reports log-probs of the whole vocabulary, which nothing can
    correct for.

    Raises:
        SessionError: with how many they are, and what to do.
    """
    cut = [s for s in samples if is_cut(s.top_p, s.top_k)]
    if cut:
        raise _cut_error(f"{len(cut)} of {len(samples)} samples were drawn", cut[0])
    weighed = training.corrects_for_engine
    other = [
        s.temperature
        for s in samples
        if s.temperature not in (None, rollout.temperature) and not (weighed and s.temperature)
    ]
    if other:
        raise SessionError(
            f"{len(other)} of {len(samples)} samples were drawn at temperature {other[0]:g}, but "
            f"the trainer computes at {rollout.temperature:g}.",
            why="The importance ratios would compare two different distributions.",
            fix="generate without temperature= for what is trained on; or start a session with "
            f"rollout.temperature: {other[0]:g}"
            + (
                ", or with training.use_tis: true, which weighs by the difference."
                if other[0]
                else " or above; greedy responses are no sample of the policy."
            ),
        )


def is_cut(top_p: float, top_k: int) -> bool:
    """Whether only a part of the vocabulary is sampled from."""
    return top_p < 1 or top_k > 0


def refuse_cut(rollout: RolloutConfig) -> None:
    """Raise SessionError, before anything is generated, if training is impossible after a cut."""
    if is_cut(rollout.top_p, rollout.top_k):
        raise _cut_error("Responses are drawn", rollout)


def _cut_error(what: str, cut: Sample | RolloutConfig) -> SessionError:
    how = f"rollout.top_k {cut.top_k}" if cut.top_k > 0 else f"rollout.top_p {cut.top_p:g}"
    return SessionError(
        f"{what} with {how}, and cannot be trained on.",
        why="They come from a part of the vocabulary, while the log-probs of engine and trainer "
        "are of the whole: every importance ratio would be biased.",
        fix="set rollout.top_p: 1.0 and rollout.top_k: -1 for training. Generating and evaluating "
        "work with any.",
    )


def update(stack: Stack, batch: Batch, step: int) -> UpdateReport:
    """Train on a batch; a batch without samples is left alone.

    Raises:
        SessionError: samples are of another distribution than the trainer's.
    """
    config = stack.settings.config
    check_sampling(batch.samples, config.rollout, config.training)
    check_records(batch.samples, config.training)
    begin = time.perf_counter()
    if not batch.samples:
        return UpdateReport(step, {}, (), 0, 0, 0.0, batch.left_out, applied=False)
    per_step, applied = stack.update(train_batch(batch, config.training), batch.id)
    return UpdateReport(
        step=step,
        metrics=means(per_step),
        per_step=tuple(per_step),
        samples=len(batch),
        tokens=sum(len(s.tokens) for s in batch.samples),
        seconds=time.perf_counter() - begin,
        left_out=batch.left_out,
        applied=applied,
    )


def means(per_step: Sequence[Metrics]) -> Metrics:
    """Mean of each metric over the optimizer steps of an update."""
    return {name: sum(row[name] for row in per_step) / len(per_step) for name in per_step[0]}


def nothing_to_train_on(report: UpdateReport) -> SessionError:
    """Error of a step whose update did nothing."""
    return SessionError(
        "No group of this rollout could be trained on.",
        why="\n".join(report.left_out[:4]),
        fix="mend the reward function; the message above is its own.",
    )


def replayed(samples: Sequence[Sample], training: TrainingConfig) -> ExpertRecords:
    """Records of experts that the policy's passes over these samples follow; None for none."""
    from kit.samples.experts import records

    return records(samples) if training.use_rollout_routing_replay else None


def check_records(samples: Sequence[Sample], training: TrainingConfig) -> None:
    """Raise SessionError if experts are to be replayed, and no sample has a record of them."""
    if not training.use_rollout_routing_replay or not samples:
        return
    if all(s.rollout_routed_experts is None for s in samples):
        raise SessionError(
            "training.use_rollout_routing_replay is set, and no sample has a record of the "
            "engine's experts.",
            why="They were written by an engine that did not record them, or by hand.",
            fix="train on what session.generate() returns; or call "
            "session.configure(use_rollout_routing_replay=False) for samples from elsewhere.",
        )


def train_batch(batch: Batch, training: TrainingConfig) -> Any:
    """Convert a batch to a `TrainBatch` of plain lists."""
    from kit.messages import TrainBatch
    from kit.samples.experts import records

    samples = batch.samples
    logged = all(s.rollout_log_probs is not None for s in samples)
    return TrainBatch(
        tokens=[s.tokens for s in samples],
        response_lengths=[s.response_length for s in samples],
        loss_masks=[s.mask for s in samples],
        advantages=list(batch.advantages),
        rollout_log_probs=[s.rollout_log_probs or [] for s in samples] if logged else None,
        token_advantages=_as_lists(batch.token_advantages),
        values=_as_lists(batch.values),
        returns=_as_lists(batch.returns),
        experts=records(samples),
        replayed=training.use_rollout_routing_replay,
    )


def _as_lists(rows: Sequence[Sequence[float]] | None) -> list[list[float]] | None:
    return None if rows is None else [list(row) for row in rows]
