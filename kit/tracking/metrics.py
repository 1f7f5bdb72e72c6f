"""Metrics of a step and of a rollout, under Miles' names."""

from __future__ import annotations

import math
import statistics
import zlib
from collections import Counter
from collections.abc import Sequence

from kit.reports import REWARD, Metrics, SyncReport, UpdateReport
from kit.samples import Rollout, Sample, Status

REPETITIVE = 10.0
"""A response that zlib shrinks this many times repeats itself."""


def step_metrics(
    rollout: Rollout,
    update: UpdateReport,
    sync: SyncReport | None = None,
    seconds: float | None = None,
) -> dict[str, float]:
    """All metrics of one step that took so many seconds.

    `perf/rollout_time` is the engine's. Scoring that goes on after the last response is written is
    only in `perf/step_time`. Times that are not known are left out: a step made verb by verb has
    none as a whole, a rollout made by hand has none at all.
    """
    metrics = {
        **rollout_metrics(rollout),
        **update.metrics,
        "perf/actor_train_time": update.seconds,
    }
    if rollout.seconds:
        metrics["perf/rollout_time"] = rollout.seconds
        metrics["perf/tokens_per_gpu_per_sec"] = rollout.new_tokens / rollout.seconds
    if sync:
        metrics["perf/update_weights_time"] = sync.seconds
        if sync.merge_error is not None:
            metrics["train/merge_error"] = sync.merge_error
    if seconds is not None:
        metrics["perf/step_time"] = seconds
    return metrics


def routing_metrics(rollout: Rollout) -> Metrics:
    """How many tokens have a record of their experts, and how even the experts' load is."""
    found = [r for s in rollout if (r := s.rollout_routed_experts) is not None]
    rows = sum(len(s.tokens) - 1 for s in rollout)
    if not found or not rows:
        return {}
    from kit.samples.experts import load

    taken = load(found)
    even = taken.mean(1)
    known = float(sum(r.known.sum() for r in found))
    metrics = {"rollout/routing/recorded_frac": known / rows}
    if even.min() > 0:
        metrics["rollout/routing/busiest_expert"] = float((taken.max(1) / even).max())
    return metrics


def draft_metrics(rollout: Rollout) -> Metrics:
    """How many tokens a pass gave where drafts were verified, and how many of them were right."""
    counts: Counter[str] = Counter()
    for sample in rollout:
        counts.update(sample.spec_info)
    if not counts["passes"]:
        return {}
    metrics: Metrics = {"rollout/spec_draft_frac": counts["verify_ct"] / counts["passes"]}
    if counts["verify_ct"]:
        correct, proposed = counts["num_correct_drafts"], counts["num_proposed_drafts"]
        metrics["rollout/spec_accept_length"] = counts["tokens"] / counts["verify_ct"]
        metrics["rollout/spec_accept_rate"] = correct / proposed
    if counts["us"]:
        metrics["rollout/spec_speedup"] = counts["plain_us"] / counts["us"]
    return metrics


def rollout_metrics(rollout: Rollout) -> Metrics:
    """Rewards, lengths, truncation, groups without a difference, repetition."""
    lengths = [s.response_length for s in rollout]
    metrics: Metrics = {
        "rollout/response_len/mean": statistics.fmean(lengths),
        "rollout/response_len/median": float(statistics.median(lengths)),
        "rollout/response_len/max": float(max(lengths)),
        "rollout/response_len/min": float(min(lengths)),
        "rollout/truncated_ratio": _share(rollout, Status.TRUNCATED),
        "rollout/failed_ratio": _share(rollout, Status.FAILED),
        "rollout/repetition_frac": statistics.fmean(map(_repeats, rollout)),
    }
    metrics |= routing_metrics(rollout) | draft_metrics(rollout)
    if rollout.rewards():
        parts = {f"rollout/reward/{name}": mean for name, mean in rollout.mean_parts().items()}
        metrics = {REWARD: rollout.mean_reward(), **parts, **metrics}
        alike = zero_std_groups(rollout)
        metrics["rollout/zero_std_ratio"] = alike.total() / len(rollout.groups())
        for reward, groups in sorted(alike.items()):
            metrics[f"rollout/zero_std/count_{reward:g}"] = float(groups)
    return metrics | rollout.metrics


def zero_std_groups(rollout: Rollout) -> Counter[float]:
    """Groups whose samples all have the same reward, counted by that reward: nothing to learn."""
    counts: Counter[float] = Counter()
    for group in rollout.groups():
        if equal_rewards(group):
            counts[round(float(group[0].reward or 0.0), 4)] += 1
    return counts


def equal_rewards(group: Sequence[Sample]) -> bool:
    """Whether all samples have the same reward."""
    rewards = {sample.reward for sample in group}
    return len(rewards) == 1 and None not in rewards


def _share(rollout: Rollout, status: Status) -> float:
    return statistics.fmean(float(s.status is status) for s in rollout)


def _repeats(sample: Sample) -> float:
    text = sample.response.encode("utf-8", "replace")
    return float(len(text) > REPETITIVE * len(zlib.compress(text, 1)))


def pass_at_k(right: int, total: int, k: int) -> float:
    """Chance that at least one of k responses is right, from `right` of `total`; unbiased.

    1 - C(total - right, k) / C(total, k). Source: Chen et al., "Evaluating Large Language Models
    Trained on Code", 2021.
    """
    return 1.0 - math.comb(total - right, k) / math.comb(total, k)
