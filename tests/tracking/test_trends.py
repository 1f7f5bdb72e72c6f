"""What the course of a run shows and no single step does."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from kit.tracking.catalog import what_is_off
from kit.tracking.trends import ENTROPY, LENGTH, trends

REWARD = "rollout/raw_reward"


def history(
    steps: int,
    reward: Callable[[int], float] = lambda step: 0.5,
    entropy: Callable[[int], float] = lambda step: 0.5,
    length: Callable[[int], float] = lambda step: 20.0,
    noise: float = 0.03,
    seed: int = 0,
) -> list[dict[str, float]]:
    chance = random.Random(seed)
    return [
        {
            REWARD: reward(step) + chance.gauss(0, noise),
            ENTROPY: entropy(step),
            LENGTH: length(step),
        }
        for step in range(steps)
    ]


def test_a_reward_that_falls_from_0_7_to_0_3_in_six_steps_is_marked_and_the_numbers_named() -> None:
    found = trends(history(8, lambda step: 0.70 - 0.065 * max(step - 1, 0)))
    assert found.keys() == {REWARD}
    assert "fell from 0." in found[REWARD]
    assert "lower learning_rate" in found[REWARD]


@pytest.mark.parametrize("seed", range(20))
def test_noise_about_a_level_or_a_rise_is_not_marked(seed: int) -> None:
    for noise in (0.02, 0.1):
        assert not trends(history(60, noise=noise, seed=seed))
        assert not trends(history(60, lambda step: 0.3 + 0.01 * step, noise=noise, seed=seed))


def test_an_entropy_that_goes_is_marked_unless_the_reward_has_come() -> None:
    def falls(step: int) -> float:
        return 0.5 * 0.6**step

    assert ENTROPY in trends(history(10, entropy=falls))
    assert not trends(history(10, lambda step: 0.3 + 0.07 * step, entropy=falls))
    assert "dissolves" in trends(history(10, entropy=lambda step: 0.3 + 0.1 * step))[ENTROPY]


@pytest.mark.parametrize("factor", [1.4, 0.7])
def test_a_length_that_changes_suddenly_is_marked(factor: float) -> None:
    assert LENGTH in trends(history(8, length=lambda step: 20.0 * factor**step))
    assert not trends(history(60, length=lambda step: 20.0 * (1 + step / 40)))


def test_a_run_that_has_just_begun_has_no_trend() -> None:
    assert not trends([])
    assert not trends(history(3, lambda step: 1.0 - step))
    assert not trends([{"train/loss": 1.0}] * 9)
    assert not trends([{REWARD: float("nan")}] * 9)


@pytest.mark.parametrize(
    ("name", "off", "right"),
    [
        ("train/ess_ratio", 0.52, 0.97),
        ("train/update_kl", 0.2, 0.003),
        ("rollout/zero_std_ratio", 0.9, 0.4),
    ],
)
def test_numbers_of_a_ruined_step_have_no_tick(name: str, off: float, right: float) -> None:
    assert what_is_off(name, off)
    assert not what_is_off(name, right)
