"""Corrections of off-policy samples: values by hand, and the laws they obey."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from kit.algo.corrections import (
    Level,
    Mode,
    Rejection,
    effective_sample_size,
    entropy,
    icepop,
    mis,
    opsm,
    tis,
)

LEVELS: tuple[Level, ...] = get_args(Level)
MODES: tuple[Mode, ...] = get_args(Mode)
INF, NAN = math.inf, math.nan

token = st.tuples(
    st.floats(-5, 0), st.floats(-2, 2), st.floats(-3, 3), st.integers(0, 1)
)  # rollout log-prob, log-ratio, advantage, mask
Token = tuple[float, float, float, int]
Samples = list[list[Token]]
batches = st.lists(st.lists(token, min_size=1, max_size=5), min_size=1, max_size=5)
settings = st.fixed_dictionaries(
    {
        "level": st.sampled_from(LEVELS),
        "mode": st.sampled_from(MODES),
        "low": st.sampled_from([None, 0.0, 0.4, 0.9]),
        "high": st.sampled_from([1.1, 2.0, 5.0]),
        "veto": st.sampled_from([None, 0.2]),
        "rs": st.sampled_from(
            [None, Rejection("token"), Rejection("sequence", 0.3), Rejection("geometric", 0.5, 3.0)]
        ),
    }
)
Settings = dict[str, Any]


def double(values: Sequence[float]) -> torch.Tensor:
    return tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class Tokens:
    """A batch packed, in float64."""

    train: torch.Tensor
    rollout: torch.Tensor
    advantage: torch.Tensor
    sample: torch.Tensor
    mask: torch.Tensor

    def mis(self, **more: Any) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        return mis(self.train, self.rollout, self.sample, self.mask, **more)

    def opsm(self, delta: float) -> tuple[torch.Tensor, dict[str, float]]:
        return opsm(self.train, self.rollout, self.advantage, self.sample, self.mask, delta)


def packed(samples: Samples) -> Tokens:
    rows = double([t for s in samples for t in s])  # type: ignore[misc]
    lengths = tensor([len(s) for s in samples])
    return Tokens(
        train=rows[:, 0] + rows[:, 1],
        rollout=rows[:, 0],
        advantage=rows[:, 2],
        sample=torch.repeat_interleave(torch.arange(len(samples)), lengths),
        mask=rows[:, 3],
    )


def ratios(*samples: list[float], mask: list[int] | None = None) -> Tokens:
    """Samples whose tokens have these ratios of trainer to engine."""
    count = sum(map(len, samples))
    batch = packed([[(-1.0, math.log(r) if r else -INF, -1.0, 1) for r in s] for s in samples])
    return Tokens(
        batch.train, batch.rollout, batch.advantage, batch.sample, tensor(mask or [1] * count)
    )


def test_truncated_weights_are_those_worked_out_by_hand() -> None:
    train, rollout = double([0.5, 0.9, 0.2, 0.1]).log(), double([0.5, 0.3, 0.25, 0.8]).log()
    assert tis(train, rollout, 0.25, 2.0).tolist() == pytest.approx([1.0, 2.0, 0.8, 0.25])
    assert tis(train, rollout, 0.0, 9.0).tolist() == pytest.approx([1.0, 3.0, 0.8, 0.125])


def test_icepop_weights_are_those_worked_out_by_hand() -> None:
    train, rollout = double([0.5, 0.9, 0.2, 0.1]).log(), double([0.5, 0.3, 0.25, 0.8]).log()
    assert icepop(train, rollout, 0.25, 2.0).tolist() == pytest.approx([1.0, 0.0, 0.8, 0.0])
    assert icepop(train, train, 1.0, 1.0).tolist() == [1.0] * 4  # the bounds are inside


@pytest.mark.parametrize(
    ("level", "weights"),
    [
        ("token", [4.0, 0.5, 1.0, 3.0]),
        ("sequence", [2.0, 2.0, 3.0, 3.0]),
        ("geometric", [2**0.5, 2**0.5, 3**0.5, 3**0.5]),
    ],
)
def test_the_ratio_of_each_level_is_that_worked_out_by_hand(
    level: Level, weights: list[float]
) -> None:
    got, mask, _ = ratios([4.0, 0.5], [1.0, 3.0]).mis(level=level, mode="truncate", high=10.0)
    assert got.tolist() == pytest.approx(weights)
    assert mask.tolist() == [1, 1, 1, 1]


def test_aggregates_are_taken_over_active_tokens_across_a_gap() -> None:
    # 4 x 0.5 = 2 over two active tokens; the 7 between them is not counted.
    batch = ratios([4.0, 7.0, 0.5], mask=[1, 0, 1])
    for level, weight in (("sequence", 2.0), ("geometric", 2**0.5)):
        got, mask, _ = batch.mis(level=level, mode="truncate", high=10.0)
        assert got.tolist() == pytest.approx([weight, 0.0, weight])
        assert mask.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("mode", "weights", "kept", "metrics"),
    [
        ("truncate", [0.1, 1.0, 2.0, 1.5], [1, 1, 1, 1], {"truncate_fraction": 1 / 4}),
        (
            "clip",
            [0.5, 1.0, 2.0, 1.5],
            [1, 1, 1, 1],
            {"clip_fraction_low": 1 / 4, "clip_fraction_high": 1 / 4},
        ),
        (
            "mask",
            [0.1, 1.0, 3.0, 1.5],
            [0, 1, 0, 1],
            {"mask_fraction_low": 1 / 4, "mask_fraction_high": 1 / 4},
        ),
    ],
)
def test_each_mode_bounds_as_worked_out_by_hand_and_low_is_one_over_high_unless_given(
    mode: Mode, weights: list[float], kept: list[int], metrics: dict[str, float]
) -> None:
    batch = ratios([0.1, 1.0, 3.0, 1.5])
    got, mask, told = batch.mis(level="token", mode=mode, high=2.0)
    assert got.tolist() == pytest.approx(weights)
    assert mask.tolist() == kept
    by_hand = metrics | {
        "weight_mean": sum(weights) / 4,
        "weight_min": min(weights),
        "weight_max": max(weights),
        "kept_fraction": sum(kept) / 4,
    }
    assert told == pytest.approx({f"mis/{name}": value for name, value in by_hand.items()})


def test_metrics_count_active_tokens_alone() -> None:
    batch = ratios([3.0, 9.0, 1.0, 1.0], [9.0, 0.1], mask=[1, 0, 1, 1, 0, 0])
    _, _, told = batch.mis(
        level="token", mode="mask", high=2.0, veto=0.5, rs=Rejection("token", 1.0, 4.0)
    )
    assert told == pytest.approx(
        {
            "mis/mask_fraction_low": 0.0,
            "mis/mask_fraction_high": 1 / 3,
            "mis/rs_fraction": 0.0,
            "mis/veto_fraction": 0.0,
            "mis/weight_mean": 5 / 3,
            "mis/weight_min": 1.0,
            "mis/weight_max": 3.0,
            "mis/kept_fraction": 2 / 3,
        }
    )


def test_the_sum_is_clamped_not_its_terms() -> None:
    # 30 - 29 = 1; clamped token by token it would be 20 - 20 = 0.
    batch = packed([[(0.0, 30.0, 0.0, 1), (0.0, -29.0, 0.0, 1)], [(0.0, 50.0, 0.0, 1)]])
    got, _, _ = batch.mis(level="sequence", mode="truncate", high=1e9)
    assert got.tolist() == pytest.approx([math.e, math.e, math.exp(20)])


def test_rejection_leaves_the_weights_alone_and_takes_their_bounds_unless_given() -> None:
    batch = ratios([0.1, 1.0, 3.0, 1.5])
    plain, _, _ = batch.mis(level="token", mode="truncate", high=2.0)
    for rs, kept in (
        (Rejection("token"), [0, 1, 0, 1]),
        (Rejection("token", low=0.05), [1, 1, 0, 1]),
        (Rejection("token", high=3.5), [0, 1, 1, 1]),
        (Rejection("token", 1.2, 5.0), [0, 0, 1, 1]),
    ):
        got, mask, told = batch.mis(level="token", mode="truncate", high=2.0, rs=rs)
        assert torch.equal(got, plain)
        assert mask.tolist() == kept
        assert told["mis/rs_fraction"] == pytest.approx(1 - sum(kept) / 4)


def test_rejection_has_a_level_of_its_own_and_adds_to_the_mode() -> None:
    # Products 6 and 1: the first sample is rejected whole; by token, the 3 and the 0.25 are.
    batch = ratios([3.0, 2.0], [0.25, 4 / 3, 3.0])
    rs = Rejection("sequence", 0.5, 2.0)
    _, mask, told = batch.mis(level="token", mode="clip", high=3.5, rs=rs)
    assert mask.tolist() == [0, 0, 1, 1, 1]
    assert told["mis/rs_fraction"] == pytest.approx(2 / 5)
    _, mask, told = batch.mis(level="token", mode="mask", low=0.5, high=2.5, rs=rs)
    assert mask.tolist() == [0, 0, 0, 1, 0]
    assert told["mis/kept_fraction"] == pytest.approx(1 / 5)


@pytest.mark.parametrize("rs", [None, Rejection("geometric", 0.0, 1e9)])
@pytest.mark.parametrize("level", LEVELS)
def test_one_vanishing_token_vetoes_its_whole_sample_and_no_other(
    level: Level, rs: Rejection | None
) -> None:
    # The product of the first sample is 1: no level but the token sees that anything is wrong.
    batch = ratios([1e-5, 1e5], [1.0, 2e-4], [1e-9, 1.0], mask=[1, 1, 1, 1, 0, 1])
    plain, _, _ = batch.mis(level=level, mode="truncate")
    got, mask, told = batch.mis(level=level, mode="truncate", veto=1e-4, rs=rs)
    assert torch.equal(got, plain)
    assert mask.tolist() == [0, 0, 1, 1, 0, 1]
    assert told["mis/veto_fraction"] == pytest.approx(1 / 3)


def test_the_veto_sees_what_the_clamp_would_hide() -> None:
    # 1e-10 is about e^-23.03: below e^-20, to which a weight of e^-25 is clamped.
    batch = packed([[(0.0, -25.0, 0.0, 1)], [(0.0, -23.0, 0.0, 1)]])
    _, mask, _ = batch.mis(level="token", mode="truncate", veto=1e-10)
    assert mask.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("level", "mean"),
    [
        ("token", (4.0 + 0.5 + 3.0) / 3),
        ("sequence", (2.0 + 3.0) / 2),  # each sample once, the empty one not
        ("geometric", (2**0.5 + 3.0) / 2),
    ],
)
def test_normalised_weights_are_divided_by_the_mean_worked_out_by_hand(
    level: Level, mean: float
) -> None:
    batch = ratios([4.0, 0.5], [8.0], [3.0, 6.0], mask=[1, 1, 0, 1, 0])
    plain, _, told = batch.mis(level=level, mode="truncate", high=9.0)
    assert "mis/batch_norm" not in told
    got, _, told = batch.mis(level=level, mode="truncate", high=9.0, batch_normalize=True)
    torch.testing.assert_close(got, plain / mean)
    assert told["mis/batch_norm"] == pytest.approx(mean)


def test_normalising_counts_the_tokens_that_are_rejected() -> None:
    batch = ratios([4.0, 1.0, 1.0])
    got, mask, _ = batch.mis(level="token", mode="mask", high=2.0, batch_normalize=True)
    assert got.tolist() == pytest.approx([2.0, 0.5, 0.5])
    assert mask.tolist() == [0, 1, 1]


@given(batches, settings)
def test_equal_log_probs_weigh_one_and_keep_the_mask(samples: Samples, how: Settings) -> None:
    b = packed(samples)
    for normalize in (False, True):
        got, mask, _ = mis(b.train, b.train, b.sample, b.mask, **how, batch_normalize=normalize)
        assert torch.equal(got, b.mask)
        assert torch.equal(mask, b.mask)
    assert (tis(b.train, b.train, 0.5, 2.0) == 1).all()
    assert (icepop(b.train, b.train, 0.5, 2.0) == 1).all()


@given(batches, settings)
def test_weights_and_masks_stay_within_their_bounds(samples: Samples, how: Settings) -> None:
    b = packed(samples)
    got, mask, told = b.mis(**how)
    low, high = 1 / how["high"] if how["low"] is None else how["low"], how["high"]
    active = b.mask == 1
    assert (got[~active] == 0).all()
    assert (got[active] > 0).all()
    assert ((mask == b.mask) | (mask == 0)).all()
    if how["mode"] == "truncate":
        assert (got <= high).all()
    if how["mode"] == "clip":
        assert ((got[active] >= low) & (got[active] <= high)).all()
    if how["mode"] == "mask":
        assert ((got[mask == 1] >= low) & (got[mask == 1] <= high)).all()
    fractions = [value for name, value in told.items() if "fraction" in name]
    assert all(0 <= f <= 1 for f in fractions)
    weights = tis(b.train, b.rollout, low, high)
    assert ((weights >= low) & (weights <= high)).all()
    popped = icepop(b.train, b.rollout, low, high)
    assert ((popped == 0) | ((popped >= low) & (popped <= high))).all()


@given(batches, settings, st.booleans(), st.data())
def test_what_is_on_masked_tokens_changes_nothing(
    samples: Samples, how: Settings, normalize: bool, data: st.DataObject
) -> None:
    b = packed(samples)
    odd = st.lists(
        st.sampled_from([NAN, INF, -INF, -3.0]), min_size=len(b.mask), max_size=len(b.mask)
    )
    train, rollout, advantage = (
        torch.where(b.mask == 1, x, double(data.draw(odd)))
        for x in (b.train, b.rollout, b.advantage)
    )
    moved = Tokens(train, rollout, advantage, b.sample, b.mask)
    for call in (
        lambda x: x.mis(**how, batch_normalize=normalize),
        lambda x: x.opsm(0.05),
    ):
        before, after = call(b), call(moved)
        assert after[-1] == before[-1]
        assert all(torch.equal(x, y) for x, y in zip(after[:-1], before[:-1], strict=True))
    assert effective_sample_size(train - rollout, b.mask) == pytest.approx(
        effective_sample_size(b.train - b.rollout, b.mask)
    )


@given(batches, settings, st.booleans(), st.randoms(use_true_random=False))
def test_the_order_of_the_samples_does_not_matter(
    samples: Samples, how: Settings, normalize: bool, random: Random
) -> None:
    order = list(range(len(samples)))
    random.shuffle(order)
    b, moved = packed(samples), packed([samples[i] for i in order])
    places = torch.cat([(b.sample == i).nonzero()[:, 0] for i in order])
    weights, mask, told = b.mis(**how, batch_normalize=normalize)
    moved_weights, moved_mask, moved_told = moved.mis(**how, batch_normalize=normalize)
    torch.testing.assert_close(moved_weights, weights[places])
    assert torch.equal(moved_mask, mask[places])
    assert moved_told == pytest.approx(told)
    assert torch.equal(moved.opsm(0.1)[0], b.opsm(0.1)[0][places])


@given(batches, settings, st.booleans(), st.lists(token, min_size=1, max_size=3))
def test_padding_adds_nothing(
    samples: Samples, how: Settings, normalize: bool, pad: list[Token]
) -> None:
    blank = [(p, r, a, 0) for p, r, a, _ in pad]
    b, longer = packed(samples), packed([[*s, *blank] for s in samples] + [blank])
    real = torch.cat([tensor([1] * len(s) + [0] * len(blank)) for s in [*samples, []]]) == 1
    weights, mask, told = b.mis(**how, batch_normalize=normalize)
    long_weights, long_mask, long_told = longer.mis(**how, batch_normalize=normalize)
    torch.testing.assert_close(long_weights[real], weights)
    assert torch.equal(long_mask[real], mask)
    assert not long_weights[~real].any()
    assert not long_mask[~real].any()
    assert long_told == pytest.approx(told)
    masked, told = b.opsm(0.1)
    long_masked, long_told = longer.opsm(0.1)
    assert torch.equal(long_masked[real], masked)
    assert long_told == pytest.approx(told)


@given(batches, settings)
def test_samples_alone_are_treated_as_they_are_together(samples: Samples, how: Settings) -> None:
    weights, mask, _ = packed(samples).mis(**how)
    alone = [packed([s]).mis(**how) for s in samples]
    assert torch.equal(torch.cat([w for w, _, _ in alone]), weights)
    assert torch.equal(torch.cat([m for _, m, _ in alone]), mask)
    masked = torch.cat([packed([s]).opsm(0.1)[0] for s in samples])
    assert torch.equal(masked, packed(samples).opsm(0.1)[0])


@given(st.lists(token, min_size=1, max_size=8), settings, st.booleans())
def test_for_responses_of_one_token_every_level_is_the_same(
    tokens: list[Token], how: Settings, normalize: bool
) -> None:
    b = packed([[t] for t in tokens])
    by_token, *others = (
        b.mis(**how | {"level": level}, batch_normalize=normalize) for level in LEVELS
    )
    for other in others:
        torch.testing.assert_close(other[0], by_token[0])
        assert torch.equal(other[1], by_token[1])


@given(batches, settings, st.randoms(use_true_random=False))
def test_tokens_of_a_sample_need_not_be_neighbours(
    samples: Samples, how: Settings, random: Random
) -> None:
    b = packed(samples)
    order = list(range(len(b.mask)))
    random.shuffle(order)
    moved = Tokens(*(x[order] for x in (b.train, b.rollout, b.advantage, b.sample, b.mask)))
    torch.testing.assert_close(moved.mis(**how)[0], b.mis(**how)[0][order])


def test_infinite_and_nan_log_probs_of_trained_tokens_have_bounded_weights() -> None:
    train, rollout = double([0.0, -INF, NAN, -INF, -1.0]), double([-INF, -1.0, -1.0, -INF, NAN])
    assert tis(train, rollout, 0.1, 2.0).tolist() == [2.0, 0.1, 1.0, 1.0, 1.0]
    assert icepop(train, rollout, 0.1, 2.0).tolist() == [0.0, 0.0, 1.0, 1.0, 1.0]
    b = Tokens(train, rollout, -torch.ones(5), tensor([0, 1, 2, 3, 4]), torch.ones(5))
    for level in LEVELS:
        got, mask, told = b.mis(level=level, mode="mask", veto=1e-4)
        by_hand = [math.exp(20), math.exp(-20), 1.0, 1.0, 1.0]
        assert got.tolist() == pytest.approx(by_hand)
        assert mask.tolist() == [0, 0, 1, 1, 1]
        assert told["mis/veto_fraction"] == pytest.approx(1 / 5)
        assert all(map(math.isfinite, told.values()))
    assert b.opsm(0.0)[0].tolist() == [1, 0, 1, 1, 1]


def test_infinities_of_both_signs_in_a_sample_cancel() -> None:
    b = Tokens(*double([[0.0, -INF], [-INF, 0.0], [-1, -1]]), tensor([0, 0]), torch.ones(2))
    for level in ("sequence", "geometric"):
        assert b.mis(level=level, mode="mask")[0].tolist() == [1.0, 1.0]
    assert b.opsm(0.0)[0].tolist() == [1, 1]


def test_no_gradient_flows_into_the_weights_nor_a_nan_into_the_loss() -> None:
    train = double([-1.0, NAN, -INF]).requires_grad_()
    rollout, sample, mask = double([-1.5, -1.0, -INF]), tensor([0, 0, 0]), tensor([1, 0, 0])
    for weights in (
        tis(train, rollout, 0.0, 2.0),
        icepop(train, rollout, 0.0, 2.0),
        *(mis(train, rollout, sample, mask, level, "clip")[0] for level in LEVELS),
    ):
        assert not weights.requires_grad
        train.grad = None
        (torch.where(mask == 1, train, 0.0) * weights).sum().backward()
        assert train.grad is not None
        assert train.grad.tolist() == pytest.approx([math.exp(0.5), 0.0, 0.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_computed_in_full(dtype: torch.dtype) -> None:
    train, rollout = tensor([-0.5, -0.25], dtype=dtype), tensor([-0.5078125, -0.375], dtype=dtype)
    by_hand = [math.exp(1 / 128), math.exp(1 / 8)]  # bfloat16 would round the first to 1.0078125
    sample, mask = tensor([0, 1]), tensor([1, 1])
    for weights in (
        tis(train, rollout, 0.0, 2.0),
        icepop(train, rollout, 0.0, 2.0),
        *(mis(train, rollout, sample, mask, level, "clip")[0] for level in LEVELS),
    ):
        assert weights.dtype is torch.float32
        assert weights.tolist() == pytest.approx(by_hand, rel=1e-7)
    assert tis(train.double(), rollout, 0.0, 2.0).dtype is torch.float64


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.bfloat16])
def test_the_mask_keeps_its_dtype(dtype: torch.dtype) -> None:
    b = ratios([3.0, 1.0])
    mask = b.mask.to(dtype)
    kept = mis(b.train, b.rollout, b.sample, mask, "token", "mask")[1]
    assert kept.dtype is dtype
    assert kept.tolist() == [0, 1]
    assert mask.all()  # the one passed in is left alone
    assert opsm(b.train, b.rollout, b.advantage, b.sample, mask, 0.0)[0].dtype is dtype


def test_a_batch_with_nothing_to_train_on_is_no_trouble() -> None:
    for b in (
        ratios([3.0, 1.0], [0.0], mask=[0, 0, 0]),
        Tokens(*torch.empty(3, 0), torch.empty(0).long(), torch.empty(0)),
    ):
        for level in LEVELS:
            got, mask, told = b.mis(
                level=level, mode="mask", veto=0.5, rs=Rejection(level), batch_normalize=True
            )
            assert got.tolist() == mask.tolist() == [0] * len(b.mask)
            assert told == {
                "mis/mask_fraction_low": 0.0,
                "mis/mask_fraction_high": 0.0,
                "mis/rs_fraction": 0.0,
                "mis/veto_fraction": 0.0,
                "mis/weight_mean": 1.0,
                "mis/weight_min": 1.0,
                "mis/weight_max": 1.0,
                "mis/kept_fraction": 1.0,
                "mis/batch_norm": 1.0,
            }
        mask, told = b.opsm(0.0)
        assert mask.tolist() == [0] * len(b.mask)
        assert set(told.values()) == {0.0}
        assert effective_sample_size(b.train, b.mask) == 1.0
    assert tis(torch.empty(0), torch.empty(0), 0.0, 2.0).shape == (0,)
    assert icepop(torch.empty(0), torch.empty(0), 0.0, 2.0).shape == (0,)


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
    rows = [[0.0, 0.0, 0.0, 0.0], [7.0, 7.0, -INF, -INF], [5.0, -INF, -INF, -INF]]
    logits = tensor([*rows, [math.log(0.5), math.log(0.25), math.log(0.25), -INF]])
    by_hand = [math.log(4), math.log(2), 0.0, 1.5 * math.log(2)]
    assert entropy(logits).tolist() == pytest.approx(by_hand)
    assert entropy(logits.bfloat16()).dtype is torch.float32
    assert entropy(logits.view(2, 2, 4)).shape == (2, 2)


def test_entropy_of_impossible_tokens_has_the_gradient_of_the_others() -> None:
    # dH/dz = -p (ln p + H), with p = 3/4, 1/4.
    p = [0.75, 0.25]
    h = -sum(x * math.log(x) for x in p)
    logits = double([math.log(3), 0.0, -INF, -1e6]).requires_grad_()
    value = entropy(logits)
    value.backward()
    assert value.item() == pytest.approx(h)
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([-x * (math.log(x) + h) for x in p] + [0.0, 0.0])


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
def test_entropy_lies_between_nothing_and_that_of_even_chances(row: list[float]) -> None:
    value = entropy(tensor(row)).item()
    assert -1e-6 <= value <= math.log(len(row)) + 1e-5


ONE = torch.zeros(1)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: tis(ONE, ONE, 3.0, 2.0), "low 3.0 is not between 0 and high 2.0"),
    (lambda: tis(ONE, ONE, NAN, 2.0), "low nan"),
    (lambda: tis(ONE, ONE, -0.1, 2.0), "low -0.1"),
    (lambda: tis(ONE, ONE, 0.0, 0.0), "high 0.0 is not a ratio above 0"),
    (lambda: icepop(ONE, ONE, 0.0, -1.0), "high -1.0"),
    (lambda: icepop(ONE, ONE, 0.0, INF), "1e9 for no bound"),
    (lambda: icepop(ONE, ONE, 2.0, 1.0), "low 2.0"),
    (lambda: tis(ONE, torch.zeros(2), 0.0, 2.0), r"train_logp_T \(1,\), rollout_logp_T \(2,\)"),
    (lambda: icepop(ONE, torch.zeros(2), 0.0, 2.0), "shapes differ"),
    (lambda: a_mis(level="word"), "level 'word' is none of token, sequence, geometric"),
    (lambda: a_mis(mode="drop"), "mode 'drop' is none of truncate, clip, mask"),
    (lambda: a_mis(low=3.0), "low 3.0"),
    (lambda: a_mis(high=-2.0), "high -2.0"),
    (lambda: a_mis(mode="clip", high=0.5), "low 2.0 .* unless given, low is 1 / high"),
    (lambda: a_mis(veto=0.0), "veto 0.0 .* or None"),
    (lambda: a_mis(rs=Rejection("token", low=3.0)), r"rs\.low 3.0 .* rs\.high 2.0"),
    (lambda: Rejection("word"), r"rs\.level 'word'"),  # type: ignore[arg-type]
    (lambda: Rejection("token", 2.0, 1.0), r"rs\.low 2.0"),
    (lambda: Rejection("token", high=0.0), r"rs\.high 0.0"),
    (lambda: mis(ONE, ONE, tensor([0, 0]), ONE, "token", "clip"), r"sample_T \(2,\)"),
    (lambda: opsm(ONE, ONE, ONE, tensor([0]), ONE, -1.0), "delta -1.0"),
    (lambda: opsm(ONE, ONE, ONE, tensor([0]), ONE, NAN), "delta nan"),
    (lambda: opsm(ONE, ONE, torch.zeros(3), tensor([0]), ONE, 0.1), r"advantage_T \(3,\)"),
    (lambda: effective_sample_size(ONE, torch.ones(2)), r"mask \(2,\)"),
]


def a_mis(**more: Any) -> object:
    return mis(ONE, ONE, tensor([0]), ONE, **{"level": "token", "mode": "truncate"} | more)


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message for _, message in BAD])
def test_a_bad_argument_is_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_bound_below_one_is_fine_where_its_counterpart_is_not_used() -> None:
    got, _, _ = ratios([2.0, 0.25]).mis(level="token", mode="truncate", high=0.5)
    assert got.tolist() == pytest.approx([0.5, 0.25])
