"""Off-policy sequence masking, the effective sample size, and entropy."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from kit.algo.corrections import effective_sample_size, entropy_of, opsm
from tests.algo.token_batches import (
    INF,
    NAN,
    Tokens,
    double,
    ratios,
)


def test_a_bad_sample_that_drifted_is_masked_and_no_other() -> None:
    # KL is the mean of log(1 / ratio): ln 2 for the first two, ln 4 / 2 with a gap in the third,
    # -ln 2 for the last, which became likelier.
    b = ratios([0.5, 0.5], [0.5], [0.25, 0.1, 1.0], [2.0], mask=[1, 1, 1, 1, 0, 1, 1])
    advantage = double([-1, -1, 1, -2, -2, -2, -1])
    b = Tokens(b.train, b.rollout, advantage, b.sample, b.mask)
    mask, told = b.opsm(0.69)
    assert mask.tolist() == [0, 0, 1, 0, 0, 0, 1]
    assert told == pytest.approx(
        {
            "opsm/masked_fraction": 4 / 6,
            "opsm/masked_samples": 2 / 4,
            "opsm/kl_mean": math.log(2) / 2,
        }
    )
    assert b.opsm(0.70)[0].tolist() == [1, 1, 1, 1, 0, 1, 1]


def test_no_drift_and_no_bad_sample_mask_nothing() -> None:
    b = ratios([1.0, 1.0])
    assert b.opsm(0.0)[0].tolist() == [1, 1]
    b = ratios([0.1, 0.1])
    for advantage in (0.0, 1.0):
        flat = torch.full((2,), advantage)
        assert opsm(b.train, b.rollout, flat, b.sample, b.mask, 0.0)[0].tolist() == [1, 1]


def test_where_advantages_differ_in_a_sample_its_good_tokens_stay() -> None:
    b = ratios([0.5, 0.5])
    mask, told = opsm(b.train, b.rollout, tensor([-1.0, 1.0]), b.sample, b.mask, 0.1)
    assert mask.tolist() == [0, 1]
    assert told["opsm/masked_samples"] == 1.0


def test_the_effective_sample_size_is_that_worked_out_by_hand() -> None:
    # Weights 1, 2, 3: 36 / (3 x 14). The masked one would change it.
    value = double([1.0, 2.0, 3.0, 100.0]).log()
    assert effective_sample_size(value, tensor([1, 1, 1, 0])) == pytest.approx(6 / 7)
    assert effective_sample_size(torch.zeros(5), torch.ones(5)) == 1.0
    assert effective_sample_size(tensor([0.0, -INF, -INF, -INF]), torch.ones(4)) == 0.25


@given(st.lists(st.floats(-800, 800), min_size=1, max_size=20), st.floats(-1e4, 1e4))
def test_the_effective_sample_size_lies_between_one_nth_and_one_whatever_the_scale(
    values: list[float], shift: float
) -> None:
    mask = torch.ones(len(values))
    ratio = effective_sample_size(double(values), mask)
    assert (1 - 1e-12) / len(values) <= ratio <= 1 + 1e-12
    assert effective_sample_size(double(values) + shift, mask) == pytest.approx(ratio, rel=1e-6)


@pytest.mark.parametrize(
    ("values", "ratio"),
    [
        ([1e4, 0.0], 1 / 2),
        ([INF, INF, 5.0, -INF], 2 / 4),
        ([-INF, -INF], 1.0),
        ([NAN, 0.0], 1.0),
        ([NAN, math.log(3)], 16 / 20),
    ],
)
def test_the_effective_sample_size_of_extreme_ratios_is_its_limit(
    values: list[float], ratio: float
) -> None:
    for dtype in (torch.float32, torch.float64):
        got = effective_sample_size(tensor(values, dtype=dtype), torch.ones(len(values)))
        assert got == pytest.approx(ratio)


def test_entropy_is_that_worked_out_by_hand() -> None:
    rows = [[0.0, 0.0, 0.0, 0.0], [7.0, 7.0, -1e4, -1e4], [5.0, -1e4, -1e4, -1e4]]
    logits = tensor([*rows, [math.log(0.5), math.log(0.25), math.log(0.25), -1e4]])
    by_hand = [math.log(4), math.log(2), 0.0, 1.5 * math.log(2)]
    assert entropy_of(logits.log_softmax(-1)).tolist() == pytest.approx(by_hand, abs=1e-6)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
def test_entropy_lies_between_nothing_and_that_of_even_chances(row: list[float]) -> None:
    value = entropy_of(tensor(row).log_softmax(-1)).item()
    assert -1e-6 <= value <= math.log(len(row)) + 1e-5
