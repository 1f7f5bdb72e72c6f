"""Group-relative advantages: values by hand, and the laws they obey."""

import math
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from kit.algo.advantages import group_normalize

rewards = st.floats(-100, 100, width=32)
labelled = st.lists(st.tuples(rewards, st.integers(-3, 3)), min_size=1, max_size=24)


def parts(rows: list[tuple[float, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor([r for r, _ in rows]), tensor([g for _, g in rows])


def test_one_right_of_four_has_the_advantages_worked_out_by_hand() -> None:
    # Mean 1/4; squares 9/16 + 3/16 = 3/4; divided by 4 - 1, the variance is 1/4.
    advantage = group_normalize(tensor([1.0, 0.0, 0.0, 0.0]).double(), tensor([5, 5, 5, 5]))
    by_hand = [0.75 / (0.5 + 1e-6), *[-0.25 / (0.5 + 1e-6)] * 3]
    assert advantage.tolist() == pytest.approx(by_hand, rel=1e-14)


def test_without_the_division_rewards_are_only_centred() -> None:
    reward, group = tensor([1.0, 0.0, 3.0, 5.0]), tensor([0, 0, 1, 1])
    assert group_normalize(reward, group, divide_by_std=False).tolist() == [0.5, -0.5, -1.0, 1.0]


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 40))
def test_equal_rewards_give_exactly_zero(reward: float, size: int) -> None:
    for divide in (True, False):
        advantage = group_normalize(torch.full((size,), reward), torch.zeros(size).long(), divide)
        assert advantage.tolist() == [0.0] * size


def test_eight_times_nine_tenths_is_no_difference() -> None:
    assert group_normalize(torch.full((8,), 0.9), torch.zeros(8).long()).tolist() == [0.0] * 8


def test_a_group_of_one_has_nothing_to_be_compared_with() -> None:
    advantage = group_normalize(tensor([7.0, 1.0, 0.0]), tensor([2, 1, 1]))
    assert advantage[0].item() == 0.0
    assert advantage[1].item() > 0.5


@given(labelled, st.booleans())
def test_the_advantages_of_a_group_sum_to_zero(rows: list[tuple[float, int]], divide: bool) -> None:
    reward, group = parts(rows)
    advantage = group_normalize(reward.double(), group, divide)
    for g in group.unique():
        assert math.isclose(advantage[group == g].sum().item(), 0.0, abs_tol=1e-8)


@given(labelled)
def test_a_group_whose_rewards_differ_gets_a_spread_of_one(rows: list[tuple[float, int]]) -> None:
    reward, group = parts(rows)
    advantage = group_normalize(reward.double(), group)
    for g in group.unique():
        spread = reward[group == g].double().std() if (group == g).sum() > 1 else tensor(0.0)
        if spread > 1e-2:
            std = advantage[group == g].std().item()
            assert math.isclose(std, spread.item() / (spread.item() + 1e-6), rel_tol=1e-9)


@given(labelled, st.randoms(use_true_random=False))
def test_order_and_names_of_groups_do_not_matter(
    rows: list[tuple[float, int]], random: Random
) -> None:
    reward, group = parts(rows)
    order = list(range(len(rows)))
    random.shuffle(order)
    direct = group_normalize(reward.double(), group)
    moved = group_normalize(reward.double()[order], 1000 - 7 * group[order])
    torch.testing.assert_close(moved, direct[order], rtol=1e-12, atol=1e-12)


@given(labelled, rewards, st.floats(0.125, 8.0))
def test_shifting_all_rewards_changes_nothing_and_scaling_almost_nothing(
    rows: list[tuple[float, int]], shift: float, scale: float
) -> None:
    reward, group = parts(rows)
    reward = reward.double().round()  # so that the shift is exact, and spreads are not tiny
    direct = group_normalize(reward, group)
    moved = group_normalize(reward * scale + round(shift), group)
    torch.testing.assert_close(moved, direct, rtol=1e-4, atol=1e-9)


def test_a_nan_reward_spoils_its_own_group_only() -> None:
    reward, group = tensor([1.0, math.nan, 1.0, 0.0]), tensor([0, 0, 1, 1])
    advantage = group_normalize(reward, group)
    assert advantage[:2].isnan().all()
    assert advantage[2:].tolist() == pytest.approx([0.5**0.5, -(0.5**0.5)], rel=1e-5)


def test_whole_number_rewards_have_fractional_advantages() -> None:
    whole = group_normalize(tensor([1, 0, 0, 0]), tensor([0, 0, 0, 0]))
    assert whole.tolist() == group_normalize(tensor([1.0, 0, 0, 0]), tensor([0, 0, 0, 0])).tolist()


def test_the_dtype_of_the_rewards_is_kept_and_none_gives_none() -> None:
    for dtype in (torch.float32, torch.float64):
        assert group_normalize(torch.ones(2, dtype=dtype), tensor([0, 0])).dtype is dtype
    assert group_normalize(torch.empty(0), torch.empty(0, dtype=torch.long)).shape == (0,)
