"""The learning rate over a run, worked out by hand."""

from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.algo.schedule import Schedule, learning_rate

SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)


def rates(schedule: Schedule, steps: range, *, warmup: int = 0, total: int = 8) -> list[float]:
    return [
        learning_rate(s, peak=1.0, lowest=0.2, warmup=warmup, total=total, schedule=schedule)
        for s in steps
    ]


def test_a_constant_rate_stays() -> None:
    assert rates("constant", range(20)) == [1.0] * 20


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_warm_up_rises_in_equal_steps_to_the_peak(schedule: Schedule) -> None:
    assert rates(schedule, range(5), warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_a_linear_rate_falls_in_equal_steps_from_the_end_of_the_warm_up() -> None:
    by_hand = [1.0, 0.8, 0.6, 0.4, 0.2]
    assert rates("linear", range(4, 9), warmup=4) == pytest.approx(by_hand)


def test_a_cosine_rate_is_half_way_at_half_time() -> None:
    by_hand = [1.0, 0.2 + 0.8 * (1 + 0.5**0.5) / 2, 0.6, 0.2 + 0.8 * (1 - 0.5**0.5) / 2, 0.2]
    assert rates("cosine", range(0, 9, 2)) == pytest.approx(by_hand)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_training_on_past_the_end_keeps_the_lowest_rate(schedule: Schedule) -> None:
    assert rates(schedule, range(8, 30)) == pytest.approx([0.2] * 22)


@given(
    st.sampled_from(SCHEDULES),
    st.integers(0, 50),
    st.integers(0, 20),
    st.integers(1, 40),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_every_rate_lies_between_nothing_and_the_peak_and_falls_after_the_warm_up(
    schedule: Schedule, step: int, warmup: int, total: int, a: float, b: float
) -> None:
    lowest, peak = sorted([a, b])

    def at(step: int) -> float:
        return learning_rate(
            step, peak=peak, lowest=lowest, warmup=warmup, total=total, schedule=schedule
        )

    assert 0 <= at(step) <= peak * (1 + 1e-12)
    if step >= warmup:
        assert lowest * (1 - 1e-12) <= at(step + 1) <= at(step) * (1 + 1e-12)
    else:
        assert at(step) <= at(step + 1) * (1 + 1e-12)
