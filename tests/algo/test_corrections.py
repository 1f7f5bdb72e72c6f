"""Corrections of off-policy samples: weights and masks by hand, at the edges too."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import tensor

from kit.algo.corrections import (
    Level,
    Mode,
    Rejection,
    effective_sample_size,
    mis,
    opsm,
    tis,
)
from tests.algo.token_batches import (
    INF,
    LEVELS,
    NAN,
    Tokens,
    double,
    packed,
    ratios,
)


def test_truncated_weights_are_those_worked_out_by_hand() -> None:
    train, rollout = double([0.5, 0.9, 0.2, 0.1]).log(), double([0.5, 0.3, 0.25, 0.8]).log()
    assert tis(train, rollout, 0.25, 2.0).tolist() == pytest.approx([1.0, 2.0, 0.8, 0.25])
    assert tis(train, rollout, 0.0, 9.0).tolist() == pytest.approx([1.0, 3.0, 0.8, 0.125])


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


def test_infinite_and_nan_log_probs_of_trained_tokens_have_bounded_weights() -> None:
    train, rollout = double([0.0, -INF, NAN, -INF, -1.0]), double([-INF, -1.0, -1.0, -INF, NAN])
    assert tis(train, rollout, 0.1, 2.0).tolist() == [2.0, 0.1, 1.0, 1.0, 1.0]
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


ONE = torch.zeros(1)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: tis(ONE, ONE, 3.0, 2.0), "low 3.0 is not between 0 and high 2.0"),
    (lambda: tis(ONE, ONE, NAN, 2.0), "low nan"),
    (lambda: tis(ONE, ONE, -0.1, 2.0), "low -0.1"),
    (lambda: tis(ONE, ONE, 0.0, 0.0), "high 0.0 is not a ratio above 0"),
    (lambda: tis(ONE, torch.zeros(2), 0.0, 2.0), r"train_logp_T \(1,\), rollout_logp_T \(2,\)"),
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
