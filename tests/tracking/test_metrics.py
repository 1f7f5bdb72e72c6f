"""The numbers of a rollout, worked out by hand."""

import itertools
import math
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit.samples import Rollout, Sample, Status
from kit.tracking.metrics import pass_at_k, rollout_metrics, zero_std_groups


def test_rewards_lengths_and_shares_are_those_worked_out_by_hand() -> None:
    rollout = Rollout(
        [
            Sample(group_index=0, reward=1.0, response_length=4, status=Status.COMPLETED),
            Sample(group_index=0, reward=0.0, response_length=10, status=Status.TRUNCATED),
            Sample(group_index=1, reward=1.0, response_length=2, status=Status.COMPLETED),
            Sample(group_index=1, response_length=8).with_failure("no"),
        ]
    )
    metrics = rollout_metrics(rollout)
    assert metrics["rollout/raw_reward"] == pytest.approx(2 / 3)
    assert metrics["rollout/response_len/mean"] == 6.0
    assert metrics["rollout/response_len/median"] == 6.0
    assert metrics["rollout/response_len/max"] == 10.0
    assert metrics["rollout/response_len/min"] == 2.0
    assert metrics["rollout/truncated_ratio"] == 0.25
    assert metrics["rollout/failed_ratio"] == 0.25
    assert metrics["rollout/repetition_frac"] == 0.0
    assert not [name for name in metrics if "zero_std/count" in name]
    assert metrics["rollout/zero_std_ratio"] == 0.0


def test_before_scoring_there_are_lengths_but_no_rewards() -> None:
    metrics = rollout_metrics(Rollout([Sample(response_length=3)]))
    assert metrics["rollout/response_len/mean"] == 3.0
    assert "rollout/raw_reward" not in metrics


def test_groups_without_a_difference_are_counted_by_their_reward() -> None:
    rewards = {0: [1.0, 1.0], 1: [0.0, 0.0], 2: [0.0, 1.0], 3: [0.0, 0.0], 4: [0.1, 0.1]}
    rollout = Rollout(Sample(group_index=g, reward=r) for g, row in rewards.items() for r in row)
    assert zero_std_groups(rollout) == {1.0: 1, 0.0: 2, 0.1: 1}
    metrics = rollout_metrics(rollout)
    assert metrics["rollout/zero_std/count_0"] == 2.0
    assert metrics["rollout/zero_std_ratio"] == 0.8
    assert metrics["rollout/zero_std/count_1"] == 1.0
    assert metrics["rollout/zero_std/count_0.1"] == 1.0


def test_a_group_with_a_failed_sample_counts_as_none_without_a_difference() -> None:
    rollout = Rollout([Sample(reward=1.0), Sample().with_failure("no")])
    assert zero_std_groups(rollout) == {}
    assert zero_std_groups(Rollout([Sample().with_failure("no")] * 2)) == {}


def test_a_response_that_repeats_itself_is_told_from_one_that_does_not() -> None:
    noise = "".join(chr(33 + zlib.crc32(bytes([i])) % 90) for i in range(200))
    rollout = Rollout([Sample(response="so so " * 200), Sample(response=noise), Sample()])
    assert rollout_metrics(rollout)["rollout/repetition_frac"] == pytest.approx(1 / 3)


def test_half_a_character_in_a_response_breaks_no_metric() -> None:
    assert rollout_metrics(Rollout([Sample(response="\ud83d")]))["rollout/repetition_frac"] == 0.0


@settings(deadline=None)
@given(st.data())
def test_pass_at_k_is_the_share_of_k_subsets_with_a_right_answer(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 7))
    right = data.draw(st.integers(0, total))
    k = data.draw(st.integers(1, total))
    subsets = list(itertools.combinations([True] * right + [False] * (total - right), k))
    share = sum(map(any, subsets)) / len(subsets)
    assert math.isclose(pass_at_k(right, total, k), share, abs_tol=1e-12)


def test_pass_at_one_is_the_share_of_right_answers_and_one_right_of_all_is_certain() -> None:
    assert pass_at_k(3, 4, 1) == 0.75
    assert pass_at_k(1, 4, 4) == 1.0
    assert pass_at_k(0, 4, 4) == 0.0
    assert pass_at_k(2, 4, 2) == pytest.approx(1 - 1 / 6)
