"""Policy losses by token and their reduction: values by hand, and the laws they obey."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from kit.algo.loss import Reduction, ppo_clip, weighted_sum, weights, where_active

HOWS: tuple[Reduction, ...] = get_args(Reduction)
token = st.tuples(
    st.floats(-5, 0), st.floats(-1, 1), st.floats(-3, 3), st.integers(0, 1)
)  # old log-prob, log-ratio, advantage, mask
batches = st.lists(st.lists(token, min_size=1, max_size=6), min_size=1, max_size=6)
Samples = list[list[tuple[float, float, float, int]]]


@dataclass(frozen=True)
class Tokens:
    """A batch packed, in float64."""

    logp: torch.Tensor
    old: torch.Tensor
    advantage: torch.Tensor
    mask: torch.Tensor
    sample: torch.Tensor


def packed(samples: Sequence[Sequence[tuple[float, float, float, int]]]) -> Tokens:
    rows = tensor([t for s in samples for t in s], dtype=torch.float64)
    lengths = tensor([len(s) for s in samples])
    return Tokens(
        logp=rows[:, 0] + rows[:, 1],
        old=rows[:, 0],
        advantage=rows[:, 2],
        mask=rows[:, 3],
        sample=torch.repeat_interleave(torch.arange(len(samples)), lengths),
    )


def reduce(
    loss: torch.Tensor,
    mask: torch.Tensor,
    sample: torch.Tensor,
    how: Reduction,
    constant_length: int = 1,
) -> torch.Tensor:
    """The loss of a batch that is one micro-batch."""
    samples = int(sample.max()) + 1 if len(sample) else 1
    weight = weights(mask, sample, how, samples, int(mask.sum()), constant_length)
    return weighted_sum(loss, weight)


def totals(samples: Samples) -> tuple[int, int]:
    return len(samples), sum(t[3] for s in samples for t in s)


def clip_of(ratio: float, advantage: float, **more: float) -> tuple[float, float]:
    logp = tensor([math.log(ratio)], dtype=torch.float64)
    loss, clipped = ppo_clip(
        logp, torch.zeros_like(logp), tensor([advantage]).double(), 0.2, **more
    )
    return loss.item(), clipped.item()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, 0.0),
        (1.1, 2.0, -2.2, 0.0),
        (1.5, 2.0, -2.4, 1.0),  # a good token, already likelier: no more to gain
        (0.5, 2.0, -1.0, 0.0),
        (0.5, -2.0, 1.6, 1.0),  # a bad token, already rarer
        (1.5, -2.0, 3.0, 0.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_the_clipped_loss_is_that_worked_out_by_hand(
    ratio: float, advantage: float, loss: float, clipped: float
) -> None:
    assert clip_of(ratio, advantage) == pytest.approx((loss, clipped))


def test_the_upper_bound_can_be_set_apart_from_the_lower() -> None:
    assert clip_of(1.5, 2.0, eps_clip_high=0.4) == pytest.approx((-2.8, 1.0))
    assert clip_of(0.5, -2.0, eps_clip_high=0.4) == pytest.approx((1.6, 1.0))


def test_dual_clip_bounds_the_loss_of_a_bad_token_and_of_no_other() -> None:
    assert clip_of(10.0, -2.0)[0] == pytest.approx(20.0)
    assert clip_of(10.0, -2.0, eps_clip_c=3.0)[0] == pytest.approx(6.0)
    assert clip_of(2.0, -2.0, eps_clip_c=3.0)[0] == pytest.approx(4.0)
    assert clip_of(10.0, 2.0, eps_clip_c=3.0)[0] == pytest.approx(-2.4)


@given(batches, st.floats(0.01, 0.9), st.floats(0.01, 2.0))
def test_clipping_never_increases_the_objective(samples: Samples, low: float, high: float) -> None:
    t = packed(samples)
    loss, clipped = ppo_clip(t.logp, t.old, t.advantage, low, high)
    plain = -(t.logp - t.old).exp() * t.advantage
    assert (loss >= plain).all()
    assert torch.equal(clipped == 1, loss > plain)


@given(batches, st.sampled_from(HOWS), st.sampled_from([None, 1.5, 3.0]))
def test_the_gradient_is_that_of_the_plain_formula_sample_by_sample(
    samples: Samples, how: Reduction, dual: float | None
) -> None:
    t = packed(samples)
    logp, plain = (t.logp.clone().requires_grad_() for _ in range(2))
    loss, _ = ppo_clip(logp, t.old, t.advantage, 0.2, 0.28, dual)
    total = reduce(loss, t.mask, t.sample, how, constant_length=7)
    total.backward()

    size, tokens = totals(samples)
    sums = []
    for place, (old, advantage, mask, sample) in enumerate(
        zip(t.old, t.advantage, t.mask, t.sample, strict=True)
    ):
        ratio = torch.exp(plain[place] - old)
        value = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.28) * advantage)
        if dual and advantage < 0:
            value = torch.minimum(value, -dual * advantage)
        active = t.mask[t.sample == sample].sum()
        share = {"token_mean": tokens, "sample_mean": active * size, "constant": 7 * size}[how]
        if mask:
            sums.append(value / share)
    expected = torch.stack(sums).sum() if sums else plain.sum() * 0
    expected.backward()
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logp.grad, plain.grad, rtol=1e-10, atol=1e-10)


def test_the_reductions_are_those_worked_out_by_hand() -> None:
    loss = tensor([1.0, 3.0, 100.0, 8.0, 50.0])
    mask, sample = tensor([1, 1, 0, 1, 0]), tensor([0, 0, 0, 1, 2])
    # Samples: (1 + 3) / 2, 8 / 1, and one that is masked away but counts.
    assert reduce(loss, mask, sample, "sample_mean").item() == pytest.approx((2 + 8 + 0) / 3)
    assert reduce(loss, mask, sample, "token_mean").item() == pytest.approx((1 + 3 + 8) / 3)
    # Three samples of at most four tokens.
    by_constant = reduce(loss, mask, sample, "constant", constant_length=4).item()
    assert by_constant == pytest.approx((1 + 3 + 8) / 4 / 3)


@given(batches, st.sampled_from(HOWS), st.data())
def test_the_loss_of_a_batch_is_the_sum_over_any_micro_batches_in_any_order(
    samples: Samples, how: Reduction, data: st.DataObject
) -> None:
    whole = packed(samples)
    at_once = reduce(whole.advantage, whole.mask, whole.sample, how)
    order = data.draw(st.permutations(range(len(samples))))
    cuts = data.draw(st.sets(st.integers(1, len(samples)), max_size=3)) | {0, len(samples)}
    bounds = sorted(cuts)
    summed = torch.zeros((), dtype=torch.float64)
    for first, last in pairwise(bounds):
        part = packed([samples[i] for i in order[first:last]])
        weight = weights(part.mask, part.sample, how, *totals(samples))
        summed += weighted_sum(part.advantage, weight)
    torch.testing.assert_close(summed, at_once, rtol=1e-12, atol=1e-12)


@given(batches)
def test_the_weights_of_a_batch_sum_to_one_where_every_sample_trains(samples: Samples) -> None:
    active = [[(*t[:3], 1) for t in sample] for sample in samples]
    t = packed(active)
    for how in HOWS[:2]:
        weight = weights(t.mask, t.sample, how, *totals(active))
        assert weight.sum().item() == pytest.approx(1.0, abs=1e-12)


@given(batches, st.sampled_from(HOWS), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_what_stands_on_masked_tokens_reaches_neither_loss_nor_gradient(
    samples: Samples, how: Reduction, poison: float
) -> None:
    t = packed(samples)

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        logp = inputs[0].clone().requires_grad_()
        loss_T, _ = ppo_clip(where_active(logp, t.mask), *inputs[1:], 0.2, 0.28, 3.0)
        total = reduce(loss_T, t.mask, t.sample, how)
        total.backward()
        return total.detach(), logp.grad

    clean = (t.logp, t.old, t.advantage)
    for poisoned in (0, 1, 2):
        spoiled = [x.clone() for x in clean]
        spoiled[poisoned][t.mask == 0] = poison
        for value, expected in zip(run(*spoiled), run(*clean), strict=True):
            assert value is not None
            assert expected is not None
            assert torch.equal(value, expected)


@pytest.mark.parametrize("how", HOWS)
def test_a_nan_loss_on_a_masked_token_is_left_out_of_the_sum(how: Reduction) -> None:
    loss = tensor([math.nan, 2.0, math.inf], requires_grad=True)
    total = reduce(loss, tensor([0, 1, 0]), tensor([0, 0, 1]), how)
    total.backward()
    assert total.item() == (2.0 if how == "token_mean" else 1.0)
    assert loss.grad is not None
    assert loss.grad[[0, 2]].tolist() == [0.0, 0.0]


def test_a_nan_advantage_on_a_trained_token_is_not_hidden() -> None:
    loss, _ = ppo_clip(tensor([0.0]), tensor([0.0]), tensor([math.nan]), 0.2)
    assert loss.isnan().all()


@pytest.mark.parametrize("logp", [-1e9, 1e9, math.nan])
def test_absurd_log_ratios_give_finite_losses_and_gradients(logp: float) -> None:
    logp_T = tensor([logp], requires_grad=True)
    for advantage in (-1.0, 1.0):
        loss, _ = ppo_clip(logp_T, tensor([-1.0]), tensor([advantage]), 0.2)
        loss.sum().backward()
        assert loss.isfinite().all()
    assert logp_T.grad is not None
    assert logp_T.grad.isfinite().all()


def test_a_batch_without_a_trained_token_costs_nothing() -> None:
    loss = tensor([5.0, 6.0])
    for how in HOWS:
        assert reduce(loss, tensor([0, 0]), tensor([0, 1]), how).item() == 0.0
        empty = torch.empty(0, dtype=torch.long)
        assert reduce(torch.empty(0), empty, empty, how).item() == 0.0


def test_an_unknown_reduction_is_named() -> None:
    with pytest.raises(ValueError, match="'mean' is none of sample_mean, token_mean, constant"):
        weights(tensor([1]), tensor([0]), "mean", 1, 1)  # type: ignore[arg-type]
