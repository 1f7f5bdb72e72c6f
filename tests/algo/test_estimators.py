"""Advantages by sample and by token: values worked out by hand, and the laws they keep."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from kit.algo.advantages import (
    gae,
    group_normalize,
    leave_one_out,
    reinforce_plus_plus,
    reinforce_plus_plus_baseline,
    token_rewards,
    whiten,
)

F64 = torch.float64
# Two samples: the first trains its tokens 0, 2 and 3, the second its first one.
SAMPLE = tensor([0, 0, 0, 0, 1, 1])
MASK = tensor([1, 0, 1, 1, 1, 0])
KL = tensor([0.1, 9.0, 0.2, 0.3, 0.4, 9.0], dtype=F64)
REWARD = tensor([2.0, -1.0], dtype=F64)

numbers = st.floats(-5, 5, allow_nan=False, width=32)
tokens = st.lists(
    st.lists(st.tuples(numbers, numbers, st.booleans()), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)
Tokens = list[list[tuple[float, float, bool]]]


def packed(samples: Tokens) -> tuple[torch.Tensor, ...]:
    """Value, reward, sample and mask of each token."""
    flat = [(*token, i) for i, sample in enumerate(samples) for token in sample]
    value, reward, mask, sample = zip(*flat, strict=True)
    return tensor(value, dtype=F64), tensor(reward, dtype=F64), tensor(sample), tensor(mask).int()


def test_leaving_one_out_compares_with_the_mean_of_the_others() -> None:
    reward = tensor([1.0, 0.0, 0.0, 5.0, 7.0])
    group = tensor([3, 3, 3, 9, 8])
    assert leave_one_out(reward, group).tolist() == pytest.approx([1.0, -0.5, -0.5, 0.0, 0.0])


@given(st.lists(numbers, min_size=2, max_size=8))
def test_leaving_one_out_is_the_plain_formula(rewards: list[float]) -> None:
    out = leave_one_out(tensor(rewards, dtype=F64), torch.zeros(len(rewards), dtype=torch.long))
    for i, reward in enumerate(rewards):
        others = rewards[:i] + rewards[i + 1 :]
        assert out[i].item() == pytest.approx(reward - sum(others) / len(others), abs=1e-9)


def test_equal_rewards_leave_nothing_whatever_their_rounding() -> None:
    reward, group = torch.full((8,), 0.9), torch.zeros(8, dtype=torch.long)
    assert leave_one_out(reward, group).tolist() == [0.0] * 8
    assert group_normalize(reward, group, divide_by_std=False).tolist() == [0.0] * 8


def test_dr_grpo_centres_and_does_not_divide() -> None:
    reward, group = tensor([3.0, 1.0, 7.0]), tensor([0, 0, 1])
    assert group_normalize(reward, group, divide_by_std=False).tolist() == [1.0, -1.0, 0.0]
    whole_numbers = group_normalize(tensor([1, 0]), tensor([0, 0]), divide_by_std=False)
    assert whole_numbers.tolist() == [0.5, -0.5]


def test_the_reward_of_a_sample_is_on_its_last_trained_token() -> None:
    out = token_rewards(REWARD, KL, SAMPLE, MASK, kl_coef=0.5)
    assert out.tolist() == pytest.approx([-0.05, 0.0, -0.1, 2 - 0.15, -1 - 0.2, 0.0])
    assert token_rewards(REWARD, KL * math.nan, SAMPLE, MASK, 0.0).tolist() == [0, 0, 0, 2, -1, 0]


def test_reinforce_plus_plus_sums_what_is_to_come_and_gaps_cost_no_gamma() -> None:
    out = reinforce_plus_plus(REWARD, KL, SAMPLE, MASK, kl_coef=1.0, gamma=0.5)
    last = 2 - 0.3
    middle = -0.2 + 0.5 * last
    assert out.tolist() == pytest.approx([-0.1 + 0.5 * middle, 0.0, middle, last, -1.4, 0.0])


def test_reinforce_plus_plus_baseline_is_the_centred_reward_less_the_kl() -> None:
    out = reinforce_plus_plus_baseline(REWARD, tensor([4, 4]), KL, SAMPLE, MASK, kl_coef=1.0)
    assert out.tolist() == pytest.approx([1.4, 0.0, 1.3, 1.2, -1.9, 0.0])


def test_gae_is_the_one_worked_out_by_hand() -> None:
    value = tensor([1.0, 99.0, 2.0, 3.0, 5.0, 99.0], dtype=F64)
    reward = tensor([0.0, 99.0, 0.0, 4.0, 1.0, 99.0], dtype=F64)
    advantage, returns = gae(value, reward, SAMPLE, MASK, gamma=0.5, lambd=0.5)
    last = 4.0 - 3.0
    middle = (0.5 * 3 - 2) + 0.25 * last
    first = (0.5 * 2 - 1) + 0.25 * middle
    assert advantage.tolist() == pytest.approx([first, 0.0, middle, last, -4.0, 0.0])
    assert returns.tolist() == pytest.approx([first + 1, 0.0, middle + 2, 4.0, 1.0, 0.0])


@given(tokens, st.floats(0.1, 1.0))
def test_gae_with_lambda_one_is_the_discounted_return_less_the_value(
    samples: Tokens, gamma: float
) -> None:
    value, reward, sample, mask = packed(samples)
    advantage, returns = gae(value, reward, sample, mask, gamma, 1.0)
    place = 0
    for tokens_of_sample in samples:
        trained = [i for i, token in enumerate(tokens_of_sample) if token[2]]
        for rank, i in enumerate(trained):
            later = trained[rank:]
            total = sum(tokens_of_sample[j][1] * gamma**k for k, j in enumerate(later))
            assert returns[place + i].item() == pytest.approx(total, abs=1e-6)
            expected = total - tokens_of_sample[i][0]
            assert advantage[place + i].item() == pytest.approx(expected, abs=1e-6)
        place += len(tokens_of_sample)


@given(tokens)
def test_gae_with_lambda_zero_looks_one_token_ahead(samples: Tokens) -> None:
    value, reward, sample, mask = packed(samples)
    advantage, _ = gae(value, reward, sample, mask, 0.9, 0.0)
    place = 0
    for tokens_of_sample in samples:
        trained = [token for token in tokens_of_sample if token[2]]
        rows = [place + i for i, token in enumerate(tokens_of_sample) if token[2]]
        for i, row in enumerate(rows):
            following = trained[i + 1][0] if i + 1 < len(trained) else 0.0
            expected = trained[i][1] + 0.9 * following - trained[i][0]
            assert advantage[row].item() == pytest.approx(expected, abs=1e-6)
        place += len(tokens_of_sample)


@given(tokens)
def test_masked_tokens_and_padding_change_nothing(samples: Tokens) -> None:
    value, reward, sample, mask = packed(samples)
    kept = mask == 1
    poison = [torch.where(kept, x, math.nan) for x in (value, reward)]
    some = tuple(x[kept] for x in (value, reward, sample, mask))
    for all_of_them, only_trained in zip(
        gae(*poison, sample, mask, 0.9, 0.8), gae(*some, 0.9, 0.8), strict=True
    ):
        assert_close(all_of_them[kept], only_trained)
        assert (all_of_them[~kept] == 0).all()


@given(tokens, st.randoms())
def test_the_order_and_company_of_samples_change_nothing(samples: Tokens, random: object) -> None:
    def by_sample(given: Tokens) -> list[torch.Tensor]:
        value, reward, sample, mask = packed(given)
        advantage, _ = gae(value, reward, sample, mask, 0.9, 0.8)
        plus = reinforce_plus_plus(torch.ones(len(given), dtype=F64), value, sample, mask, 0.1, 0.9)
        both = torch.stack([advantage, plus], dim=1)
        return list(both.split([len(s) for s in given]))

    together = by_sample(samples)
    order = list(range(len(samples)))
    random.shuffle(order)  # type: ignore[attr-defined]
    shuffled = by_sample([samples[i] for i in order])
    for place, i in enumerate(order):
        assert_close(shuffled[place], together[i])
        assert_close(by_sample([samples[i]])[0], together[i])


def test_whitening_has_mean_zero_and_variance_one_over_trained_tokens() -> None:
    x, mask = tensor([1.0, 3.0, 100.0], dtype=F64), tensor([1, 1, 0])
    out = whiten(x, mask)
    scale = 1 / math.sqrt(2 + 1e-8)  # ((1 - 2)^2 + (3 - 2)^2) / (2 - 1)
    assert out.tolist() == pytest.approx([-scale, scale, 98 * scale])


def test_whitening_does_not_cancel_where_the_mean_is_large() -> None:
    out = whiten(tensor([1e6, 1e6 + 1, 1e6 + 2]), torch.ones(3))
    assert out.tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-6)


@pytest.mark.parametrize("x", [[4.0], [2.0, 2.0, 2.0]])
def test_whitening_equal_values_leaves_zeros(x: list[float]) -> None:
    assert whiten(tensor(x), torch.ones(len(x))).tolist() == [0.0] * len(x)


def test_whitening_without_a_trained_token_changes_nothing() -> None:
    x = tensor([1.0, 2.0])
    assert torch.equal(whiten(x, torch.zeros(2)), x)


def test_a_sample_without_a_trained_token_gets_nothing() -> None:
    mask, sample = tensor([0, 0, 1]), tensor([0, 0, 1])
    kl, reward = torch.ones(3), tensor([5.0, 1.0])
    assert reinforce_plus_plus(reward, kl, sample, mask, 0.0, 1.0).tolist() == [0.0, 0.0, 1.0]
    assert gae(kl, kl, sample, mask, 1.0, 1.0)[0].tolist() == [0.0, 0.0, 0.0]


def test_without_samples_there_is_nothing() -> None:
    none, index = torch.zeros(0), torch.zeros(0, dtype=torch.long)
    assert len(leave_one_out(none, index)) == 0
    assert len(group_normalize(none, index)) == 0
    assert len(reinforce_plus_plus(none, none, index, index, 0.1, 1.0)) == 0
    assert len(gae(none, none, index, index, 1.0, 1.0)[0]) == 0
