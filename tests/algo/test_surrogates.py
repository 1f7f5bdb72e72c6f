"""GSPO, CISPO and the critic's loss against hand-made values and plain formulas in float64."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from kit.algo.loss import cispo, finite_log_ratio, gspo, ppo_clip, value_clip, weighted_sum

F64 = torch.float64
small = st.floats(-2, 0, allow_nan=False)
rows = st.lists(st.tuples(small, small, st.floats(-3, 3)), min_size=1, max_size=8)


def columns(rows: list[tuple[float, float, float]]) -> list[torch.Tensor]:
    return [tensor(column, dtype=F64) for column in zip(*rows, strict=True)]


def test_gspo_gives_every_token_the_mean_log_ratio_of_its_sample() -> None:
    logp, old = tensor([-1.0, -2.0, 7.0, -0.5]), tensor([-1.2, -2.1, 0.0, -0.5])
    sample, mask = tensor([0, 0, 0, 1]), tensor([1, 1, 0, 1])
    advantage = tensor([1.0, 1.0, 1.0, -2.0])
    loss, clipped = gspo(logp, old, advantage, sample, mask, 0.1)
    ratio = math.exp((0.2 + 0.1) / 2)
    assert ratio > 1.1
    assert loss.tolist() == pytest.approx([-1.1, -1.1, -1.1, 2.0])
    assert clipped.tolist() == [1, 1, 1, 0]


@given(rows)
def test_gspo_of_samples_of_one_token_is_ppo(rows: list[tuple[float, float, float]]) -> None:
    logp, old, advantage = columns(rows)
    sample, mask = torch.arange(len(rows)), torch.ones(len(rows))
    both = (
        gspo(logp, old, advantage, sample, mask, 0.2, 0.3),
        ppo_clip(logp, old, advantage, 0.2, 0.3),
    )
    for one, other in zip(*both, strict=True):
        assert_close(one, other)


@given(rows)
def test_gspos_gradient_is_that_of_the_plain_formula(
    rows: list[tuple[float, float, float]],
) -> None:
    logp, old, advantage = columns(rows)
    one, other = (logp.clone().requires_grad_() for _ in range(2))
    sample, mask = torch.zeros(len(rows), dtype=torch.long), torch.ones(len(rows))
    gspo(one, old, advantage, sample, mask, 0.2, 0.3)[0].sum().backward()
    ratio = (other - old).mean().exp()
    (-torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.3) * advantage)).sum().backward()
    assert_close(one.grad, other.grad, rtol=1e-10, atol=1e-10)


def test_cispo_bounds_the_weight_and_keeps_the_gradient() -> None:
    old = tensor([-1.0, -1.0, -1.0])
    logp = (old + tensor([0.0, 1.0, -1.0])).requires_grad_()
    advantage = tensor([2.0, 1.0, 1.0])
    loss, clipped = cispo(logp, old, advantage, 0.2, 0.5)
    assert loss.tolist() == pytest.approx([2.0, 0.0, 0.8 * 2.0])
    assert clipped.tolist() == [0, 1, 1]
    loss.sum().backward()
    assert logp.grad is not None
    assert logp.grad.tolist() == pytest.approx([-2.0, -1.5, -0.8])


@given(rows)
def test_at_equal_log_probs_all_surrogates_have_the_gradient_of_reinforce(
    rows: list[tuple[float, float, float]],
) -> None:
    logp, _, advantage = columns(rows)
    sample, mask = torch.zeros(len(rows), dtype=torch.long), torch.ones(len(rows))
    for name in ("ppo", "cispo", "gspo"):
        x = logp.clone().requires_grad_()
        if name == "ppo":
            loss = ppo_clip(x, logp, advantage, 0.2)[0]
        elif name == "cispo":
            loss = cispo(x, logp, advantage, 0.2)[0]
        else:
            loss = gspo(x, logp, advantage.mean().expand_as(logp), sample, mask, 0.2)[0]
        loss.sum().backward()
        expected = advantage.mean().expand_as(logp) if name == "gspo" else advantage
        assert_close(x.grad, -expected, rtol=1e-10, atol=1e-10)


def test_the_values_loss_is_the_larger_of_plain_and_clipped() -> None:
    value, old = tensor([1.0, 1.0, 0.1]), tensor([0.0, 0.0, 0.0])
    returns = tensor([2.0, 0.0, 1.0])
    loss, clipped = value_clip(value, old, returns, 0.2)
    assert loss.tolist() == pytest.approx([1.8**2 / 2, 0.5, 0.9**2 / 2])
    assert clipped.tolist() == [1, 0, 0]
    loss, clipped = value_clip(value, old, returns, None)
    assert loss.tolist() == pytest.approx([0.5, 0.5, 0.405])
    assert clipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("logp", [-math.inf, math.inf, math.nan])
def test_what_is_not_finite_becomes_a_ratio_that_is(logp: float) -> None:
    expected = {-math.inf: -20.0, math.inf: 20.0}.get(logp, 0.0)
    assert finite_log_ratio(tensor([logp]), tensor([-1.0])).item() == expected
    assert finite_log_ratio(tensor([-math.inf]), tensor([-math.inf])).item() == 0.0


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_a_masked_token_poisons_neither_gspos_value_nor_its_gradient(poison: float) -> None:
    mask, sample = tensor([1, 0, 1]), tensor([0, 0, 0])
    old, advantage = tensor([-1.0, -1.0, -2.0]), torch.ones(3)
    results = []
    for value in (poison, -1.0):
        logp = tensor([-0.9, value, -2.0]).requires_grad_()
        loss, _ = gspo(logp, old, advantage, sample, mask, 0.2)
        total = weighted_sum(loss, mask.double())
        total.backward()
        assert logp.grad is not None
        results.append((total.item(), logp.grad[mask == 1].tolist()))
    assert results[0] == results[1]


def test_a_sample_that_is_masked_away_has_a_ratio_of_one() -> None:
    loss, _ = gspo(tensor([3.0]), tensor([-1.0]), tensor([1.0]), tensor([0]), tensor([0]), 0.2)
    assert loss.tolist() == [-1.0]
