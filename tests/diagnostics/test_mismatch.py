"""The verdict on trainer against engine, and the cause it names."""

import math
from dataclasses import replace
from typing import Any

import pytest

from kit.config import MismatchConfig
from kit.diagnostics.mismatch import WORST, compare
from kit.reports import MismatchReport
from kit.samples import Sample
from kit.weight_sync.verify import Checksums

NAN, INF = math.nan, math.inf


def sample(rollout: list[float], *, mask: list[int] | None = None, **more: Any) -> Sample:
    """A response with these log-probs of the engine, after a prompt of two tokens."""
    size = len(rollout)
    return Sample(
        tokens=[90, 91, *range(10, 10 + size)],
        response_length=size,
        rollout_log_probs=rollout,
        loss_mask=mask,
        weight_versions=more.pop("weight_versions", [4]),
        **more,
    )


def check(
    samples: list[Sample],
    train: list[list[float]],
    config: MismatchConfig | None = None,
    dtype: str = "float32",
) -> MismatchReport:
    return compare(
        samples,
        train,
        config=config or MismatchConfig(),
        dtype=dtype,
        trainer_version=4,
        token_text=lambda token: f"<{token}>",
    )


def apart(difference: float, **more: Any) -> MismatchReport:
    """The report on one token on which both sides differ by this much."""
    return check([sample([-1.0])], [[-1.0 + difference]], **more)


def test_the_numbers_are_those_worked_out_by_hand() -> None:
    report = check([sample([-1.0, -2.0]), sample([-0.5])], [[-1.25, -2.0], [0.0]])
    assert report.tokens == 3
    assert report.mean_abs_diff == pytest.approx(0.25)
    assert report.max_abs_diff == 0.5
    # k3 of the differences -0.25, 0 and 0.5: e^d - 1 - d.
    by_hand = ((math.exp(-0.25) - 0.75) + 0 + (math.exp(0.5) - 1.5)) / 3
    assert report.kl_k3 == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "difference", "verdict"),
    [
        ("float32", 0.0, "pass"),
        ("float32", 0.9e-5, "pass"),
        ("float32", 2e-5, "warn"),
        ("float32", -2e-5, "warn"),
        ("float32", 2e-3, "fail"),
        ("bfloat16", 0.015, "pass"),
        ("bfloat16", 0.05, "warn"),
        ("bfloat16", 0.2, "fail"),
    ],
)
def test_the_dtype_sets_the_thresholds(dtype: str, difference: float, verdict: str) -> None:
    assert apart(difference, dtype=dtype).verdict == verdict


def test_thresholds_that_are_set_replace_those_of_the_dtype() -> None:
    config = MismatchConfig(warn_above=0.5, fail_above=2.0)
    verdicts = [apart(d, config=config).verdict for d in (0.25, 1.0, 3.0)]
    assert verdicts == ["pass", "warn", "fail"]


def test_a_threshold_set_on_one_side_moves_the_other_out_of_its_way() -> None:
    strict, lax = MismatchConfig(fail_above=1e-6), MismatchConfig(warn_above=0.5)
    assert apart(5e-6, config=strict).verdict == "fail"
    assert apart(0.25, config=lax).verdict == "pass"
    assert apart(1.0, config=lax).verdict == "fail"


def test_a_difference_under_stale_weights_fails_and_names_both_versions() -> None:
    report = check([sample([-1.0], weight_versions=[2, 3])], [[-1.0001]])
    assert report.verdict == "fail"
    assert report.rollout_versions == (2, 3)
    assert "Stale weights" in report.cause
    assert "version 2, 3" in report.cause
    assert "version 4" in report.cause
    assert "session.sync()" in report.cause


def test_a_difference_under_fresh_weights_is_not_blamed_on_them() -> None:
    cause = apart(2e-5).cause
    assert "weights are not stale" in cause
    assert "float32" in cause


def test_old_weights_that_agree_are_a_warning() -> None:
    report = check([sample([-1.0], weight_versions=[3])], [[-1.0]])
    assert report.verdict == "warn"
    assert "Stale weights" in report.cause


def test_masked_tokens_count_in_nothing() -> None:
    report = check([sample([-1.0, NAN, -2.0], mask=[1, 0, 1])], [[-1.0, 5.0, -2.0]])
    assert (report.verdict, report.tokens, report.max_abs_diff) == ("pass", 2, 0.0)
    assert [d.position for d in report.worst] == [0, 2]


def test_the_worst_tokens_come_first_with_sample_place_text_and_both_numbers() -> None:
    samples = [sample([-1.0] * 6, index=7), sample([-1.0] * 6, index=9)]
    samples[0] = replace(samples[0], tokens=[80, *samples[0].tokens])
    train = [[-1.0] * 6, [-1.0, -1.0, -1.5, -1.0, -0.9, -1.0]]
    report = check(samples, train)
    assert len(report.worst) == WORST
    first, second = report.worst[:2]
    assert (first.sample_index, first.position, first.token) == (9, 2, "<12>")
    assert (first.rollout_log_prob, first.train_log_prob) == (-1.0, -1.5)
    assert first.difference == -0.5
    assert second.position == 4


@pytest.mark.parametrize("train", [[-1.0, NAN, -1.5], [NAN, -1.0, -1.5], [-1.0, -1.5, NAN]])
def test_a_nan_fails_and_leads_the_list_wherever_it_stands(train: list[float]) -> None:
    report = check([sample([-1.0] * 3)], [train])
    assert report.verdict == "fail"
    assert math.isnan(report.max_abs_diff)
    assert math.isnan(report.worst[0].train_log_prob)


def test_infinite_differences_in_both_directions_fail_with_a_kl_that_is_not_negative() -> None:
    report = check([sample([-1.0, -INF])], [[-INF, -1.0]])
    assert (report.verdict, report.max_abs_diff, report.kl_k3) == ("fail", INF, INF)
    assert check([sample([-INF])], [[-1.0]]).kl_k3 > 0


def test_no_token_to_compare_passes_with_zeros() -> None:
    report = check([sample([-1.0], mask=[0])], [[0.0]])
    assert (report.verdict, report.tokens, report.mean_abs_diff, report.kl_k3) == ("pass", 0, 0, 0)


def test_both_kls_ratios_and_effective_sample_size_are_those_worked_out_by_hand() -> None:
    report = check([sample([-1.0, -2.0])], [[-1.0 + math.log(2), -2.0 - math.log(2)]])
    assert report.kl_k1 == pytest.approx(0.0, abs=1e-12)
    assert report.ratio_range == pytest.approx((0.5, 2.0))
    # Weights 2 and 1/2: (2.5)^2 / (2 * 4.25).
    assert report.effective_sample_size == pytest.approx(6.25 / 8.5)
    lower = check([sample([-1.0, -2.0])], [[-1.5, -2.1]])
    assert lower.kl_k1 == pytest.approx(0.3)  # the engine is surer of its own tokens


def test_quantiles_are_differences_that_occur() -> None:
    gaps = [i / 1000 for i in range(1000)]
    report = check([sample([-1.0] * 1000)], [[-1.0 - gap for gap in gaps]])
    assert report.quantiles == pytest.approx({0.5: 0.499, 0.9: 0.899, 0.99: 0.989, 0.999: 0.998})


def test_the_curve_over_positions_puts_long_responses_together() -> None:
    train = [[-1.0 - 0.01 * place for place in range(100)]]
    report = check([sample([-1.0] * 100)], train)
    points = report.by_position
    assert [(p.low, p.high, p.tokens) for p in points[:2]] == [(0, 3, 4), (4, 7, 4)]
    assert (points[-1].low, points[-1].high) == (96, 99)
    assert points[0].mean_abs_diff == pytest.approx(0.015)
    assert sum(p.tokens for p in points) == 100


def test_the_curve_over_probabilities_sorts_tokens_by_the_engines() -> None:
    rollout = [math.log(p) for p in (0.0005, 0.05, 0.05, 0.95, 1.0)]
    train = [[x + gap for x, gap in zip(rollout, (0.5, 0.1, 0.3, 0.01, 0.0), strict=True)]]
    points = check([sample(rollout)], train).by_probability
    assert [(p.low, p.high, p.tokens) for p in points] == [
        (0.0, 0.001, 1), (0.01, 0.1, 2), (0.9, 0.99, 1), (0.99, 1.0, 1),
    ]  # fmt: skip
    assert [p.mean_abs_diff for p in points] == pytest.approx([0.5, 0.2, 0.01, 0.0])


def test_a_sample_with_fewer_log_probs_than_tokens_fails_however_well_they_agree() -> None:
    short = replace(sample([-1.0, -2.0, -3.0]), rollout_log_probs=[-1.0, -2.0])
    report = check([short], [[-1.0, -2.0, -3.0]])
    assert (report.verdict, report.tokens, report.max_abs_diff) == ("fail", 2, 0.0)


def test_the_context_of_a_token_reaches_into_the_prompt() -> None:
    worst = check([sample([-1.0] * 3)], [[-2.0, -1.0, -1.0]]).worst[0]
    assert (worst.before, worst.token, worst.after) == ("<90><91>", "<10>", "<11><12>")


def test_checksums_tell_rounded_from_different_and_from_missing() -> None:
    trainer = {
        "a": {"float32": ["1"], "bfloat16": ["2"]},
        "b": {"float32": ["3"], "bfloat16": ["4"]},
        "c": {"float32": ["5"], "bfloat16": ["6"]},
        "ours": {"float32": ["7"], "bfloat16": ["8"]},
    }
    engine = {"a": "1", "b": "4", "c": "0", "theirs": "9"}
    found = Checksums.of(trainer, [engine, engine | {"a": "0"}], "float32")
    assert (found.compared, found.different, found.rounded) == (3, ["a", "c"], ["b"])
    assert (found.engine_dtype, found.one_sided) == ("bfloat16", ["ours", "theirs"])


def test_samples_that_begin_alike_show_their_worst_token_once() -> None:
    twins = [sample(rollout=[-1.0, -0.5]) for _ in range(3)]
    report = check(twins, [[-1.4, -0.6]] * 3)
    assert [t.position for t in report.worst] == [0, 1]


@pytest.mark.parametrize("gap", [0.0, 1e-7])
def test_where_nothing_may_differ_the_smallest_difference_fails(gap: float) -> None:
    made = [sample([-0.5, -1.25]), sample([-2.0, -0.25])]
    trained = [[-0.5, -1.25], [-2.0, -0.25 - gap]]
    report = compare(
        made,
        trained,
        config=MismatchConfig(),
        dtype="bfloat16",
        exact=True,
        trainer_version=4,
        token_text=str,
    )
    assert report.exact == (gap == 0.0)
    assert report.verdict == ("fail" if gap else "pass")
    assert len(report.worst) == (1 if gap else 0)
    assert ("promises equal bits" if gap else "agree to the bit") in report.cause
    assert ("✗ fail" if gap else "✓ exact") in str(report)
    assert "true_on_policy: 0 to the bit" in str(report)
