"""`try_reward`: two rewards over one rollout, side by side, before either trains anything."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from itertools import combinations

from kit.reports import RewardDifference, RewardFailure, RewardTrial, Scoring
from kit.rewards.outcomes import traceback_text
from kit.rewards.runner import Scored, score_each
from kit.rewards.signature import Reward, reward_name
from kit.samples import Rollout
from kit.tracking.metrics import zero_std_groups

_EQUAL = 1e-9
"""Rewards that differ by no more are the same: sums of weights round differently."""


def try_reward(rollout: Rollout, reward: Reward, against: Reward) -> RewardTrial:
    """Score a rollout with both rewards and compare.

    Raises RewardError as `score_samples` does.
    """
    tried, other = scoring(rollout, reward), scoring(rollout, against)
    signs = [
        (_sign(one[0], two[0]), _sign(one[1], two[1]))
        for group in _scored_by_both(tried.rollout, other.rollout)
        for one, two in combinations(group, 2)
    ]
    return RewardTrial(
        tried=tried,
        against=other,
        differences=_differences(tried.rollout, other.rollout),
        pairs_alike=sum(one == two for one, two in signs),
        pairs_told_apart_by_one=sum((one == 0) != (two == 0) for one, two in signs),
        pairs_opposed=sum(one * two < 0 for one, two in signs),
    )


def scoring(rollout: Rollout, reward: Reward) -> Scoring:
    """Score a rollout with one reward."""
    begin = time.perf_counter()
    scored = score_each(rollout.samples, reward)
    seconds = time.perf_counter() - begin
    result = rollout.with_samples(one.sample for one in scored)
    return Scoring(
        name=reward_name(reward),
        rollout=result,
        seconds=seconds,
        call_seconds=tuple(one.seconds for one in scored),
        failures=_failures(scored),
        zero_variance_groups=zero_std_groups(result).total(),
        left_out_groups=sum(any(s.reward is None for s in group) for group in result.groups()),
    )


def _failures(scored: Iterable[Scored]) -> tuple[RewardFailure, ...]:
    by_message: dict[str, list[Scored]] = {}
    for one in scored:
        if one.exception is not None:
            by_message.setdefault(one.sample.error or "", []).append(one)
    failures = [
        RewardFailure(
            message,
            traceback_text(members[0].exception, members[0].function),
            tuple(one.sample for one in members),
        )
        for message, members in by_message.items()
    ]
    return tuple(sorted(failures, key=lambda failure: -len(failure.samples)))


def _differences(tried: Rollout, other: Rollout) -> tuple[RewardDifference, ...]:
    both = [
        RewardDifference(one, one.reward, two.reward)
        for one, two in zip(tried, other, strict=True)
        if one.reward is not None and two.reward is not None
    ]
    differ = [pair for pair in both if _sign(pair.reward, pair.against)]
    return tuple(sorted(differ, key=lambda pair: -abs(pair.difference)))


def _scored_by_both(tried: Rollout, other: Rollout) -> list[list[tuple[float, float]]]:
    """The rewards (tried, other) of each group's samples that have both."""
    groups: dict[int, list[tuple[float, float]]] = {}
    for one, two in zip(tried, other, strict=True):
        if one.reward is not None and two.reward is not None:
            groups.setdefault(one.group_index, []).append((one.reward, two.reward))
    return list(groups.values())


def _sign(one: float, two: float) -> int:
    """Order of two rewards: 1, 0 or -1."""
    if math.isclose(one, two, rel_tol=_EQUAL, abs_tol=_EQUAL):
        return 0
    return 1 if one > two else -1
