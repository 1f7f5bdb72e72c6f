"""A reward tried beside another tells what training with it would be like, and trains nothing."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from kit import RLSession
from kit.diagnostics.reward_trial import reward_name, try_reward
from kit.errors import RewardError, SessionError
from kit.reports import RewardTrial
from kit.samples import Rollout, Sample, Status
from tests.viz.test_hostile_text import HOSTILE, assert_harmless, assert_visible


def rollout(responses: str = "1234 5678", label: str = "4") -> Rollout:
    """A group for each word, a sample for each of its letters."""
    samples = [
        Sample(group_index=group, prompt=f"prompt {group}", response=letter, label=label,
               tokens=[1, ord(letter)], response_length=1, status=Status.COMPLETED,
               rollout_log_probs=[-0.1])
        for group, word in enumerate(responses.split())
        for letter in word
    ]  # fmt: skip
    return Rollout([replace(s, index=i) for i, s in enumerate(samples)], step=3)


def tried(reward: Any, against: Any = "exact", on: Rollout | None = None) -> RewardTrial:
    return try_reward(rollout() if on is None else on, reward, against)


def html(trial: RewardTrial) -> str:
    return trial._repr_mimebundle_()["text/html"]


def plain(trial: RewardTrial) -> str:
    return trial._repr_mimebundle_()["text/plain"]


def size(sample: Sample) -> float:
    return int(sample.response) / 8


def test_both_rewards_score_the_same_samples() -> None:
    trial = tried(size)
    assert trial.tried.rollout.rewards() == [i / 8 for i in range(1, 9)]
    assert trial.against.rollout.rewards() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert (trial.tried.name, trial.against.name) == ("size", "exact")
    with pytest.raises(FrozenInstanceError):
        trial.tried = trial.against  # type: ignore[misc]


def test_differences_come_with_the_largest_first() -> None:
    trial = tried(size)
    assert [d.sample.response for d in trial.differences][:4] == ["8", "7", "6", "5"]
    assert trial.differences[0].difference == 1.0
    assert [d.difference for d in trial.differences if d.sample.response == "4"] == [-0.5]


def test_rewards_that_differ_by_rounding_do_not_differ() -> None:
    trial = tried(lambda sample: 0.1 + 0.2, lambda sample: 0.3)
    assert trial.differences == ()
    assert trial.pairs_alike == 12


def test_pairs_of_a_group_are_compared_by_order_alone() -> None:
    def upside_down(sample: Sample) -> float:
        return -100 * int(sample.response)

    trial = tried(size, upside_down)
    assert (trial.pairs_alike, trial.pairs_told_apart_by_one, trial.pairs_opposed) == (0, 0, 12)
    assert tried(size, lambda s: 7 * size(s) - 3).pairs_alike == 12
    against_exact = tried(size, "exact")
    # In the first group, 4 beats three under both; every other pair is equal under `exact`.
    assert (against_exact.pairs_alike, against_exact.pairs_told_apart_by_one) == (3, 9)


def test_groups_that_teach_nothing_are_counted_under_each_reward() -> None:
    def fails_in_the_second_group(sample: Sample) -> float:
        return size(sample) if sample.group_index == 0 else math.nan

    trial = tried(fails_in_the_second_group)
    assert (trial.tried.zero_variance_groups, trial.tried.left_out_groups) == (0, 1)
    assert (trial.against.zero_variance_groups, trial.against.left_out_groups) == (1, 0)
    assert trial.tried.groups_to_learn_from == trial.against.groups_to_learn_from == 1


@pytest.mark.parametrize(
    ("value", "words"),
    [(math.nan, "nan"), (None, "is a `return` missing"), ("1.0", "'1.0' (str)"), ([1], "list")],
)
def test_values_that_are_no_number_are_grouped_without_a_traceback(value: Any, words: str) -> None:
    trial = tried(lambda sample: value if sample.index % 2 else 0.5)
    (failure,) = trial.tried.failures
    assert words in failure.message
    assert failure.traceback == ""
    assert [sample.index for sample in failure.samples] == [1, 3, 5, 7]


def test_exceptions_are_grouped_by_message_with_the_traceback_of_the_function() -> None:
    def look_up(sample: Sample) -> float:
        return {"1": 1.0, "2": 0.5}[sample.response if sample.index < 4 else "x"]

    first, *others = tried(look_up).tried.failures
    assert first.message == "KeyError: 'x' (line 2 of reward function)"
    assert len(first.samples) == 4
    assert [len(failure.samples) for failure in others] == [1, 1]
    lines = first.traceback.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert "in look_up" in lines[1], "the kit's own frames do not help anybody"
    assert lines[-1] == "KeyError: 'x'"


def test_a_batch_function_is_one_call_and_one_failure() -> None:
    def judge(samples: list[Sample]) -> list[float]:
        return [size(sample) for sample in samples]

    def broken(samples: list[Sample]) -> list[float]:
        raise ValueError("no judge")

    trial = tried(judge, broken)
    assert trial.tried.call_seconds == (None,) * 8
    assert trial.tried.slowest() == []
    assert trial.tried.seconds > 0
    assert "One call scored all samples" in html(trial)
    (failure,) = trial.against.failures
    assert len(failure.samples) == 8
    assert "in broken" in failure.traceback


@pytest.mark.parametrize("which", ["tried", "against"])
def test_the_wrong_number_of_rewards_is_an_error_as_when_scoring(which: str) -> None:
    rewards = {"tried": size, "against": size} | {which: lambda samples: [1.0]}
    with pytest.raises(RewardError, match="returned 1 rewards for 8 samples"):
        tried(rewards["tried"], rewards["against"])


def test_the_slowest_calls_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def slow_on_three(sample: Sample) -> float:
        clock[0] += float(sample.response == "3")
        return 0.0

    trial = tried(slow_on_three).tried
    calls = trial.slowest()
    assert calls[0][0].response == "3"
    assert len(calls) == 8
    assert [seconds for _, seconds in calls] == [1.0, *[0.0] * 7]
    assert trial.seconds == 1.0


def test_each_call_of_an_async_function_is_timed() -> None:
    async def judge(sample: Sample) -> float:
        await asyncio.sleep(0)
        return size(sample)

    assert all(seconds is not None for seconds in tried(judge).tried.call_seconds)


def test_aborted_samples_are_scored_by_nobody() -> None:
    samples = list(rollout())
    samples[0] = replace(samples[0], status=Status.ABORTED)
    trial = tried(size, on=Rollout(samples))
    assert trial.tried.call_seconds[0] is None
    assert trial.tried.left_out_groups == 1
    assert len(trial.differences) == 7


def test_the_rollout_that_is_tried_on_stays_as_it_is() -> None:
    scored = rollout().with_samples(s.with_reward(0.25) for s in rollout())
    before = [sample.to_dict() for sample in scored]
    tried(lambda sample: 1 / 0, on=scored)
    assert [sample.to_dict() for sample in scored] == before


@pytest.mark.parametrize(
    ("reward", "name"),
    [
        ("exact", "exact"),
        ({"exact": 0.9, "number": 0.1}, "0.9*exact + 0.1*number"),
        (size, "size"),
        (lambda sample: 1.0, "a lambda"),
    ],
)
def test_a_reward_is_called_by_its_name(reward: Any, name: str) -> None:
    assert reward_name(reward) == name


def test_callable_objects_are_called_by_their_class() -> None:
    class Judge:
        def __call__(self, sample: Sample) -> float:
            return 1.0

    assert reward_name(Judge()) == "Judge"


def test_a_table_has_both_rewards_beside_each_sample() -> None:
    table = tried(size).to_pandas()
    assert list(table["difference"])[-1] == 1.0
    assert {"reward", "against", "difference", "error", "against_error", "seconds"} <= set(table)
    assert len(table) == 8


def test_a_trial_can_be_browsed_by_difference() -> None:
    browser = tried(size).browse()
    browser.controls.order.value = "highest difference first"
    assert browser.listed[:2] == [7, 6]


# ---- what is shown -----------------------------------------------------------------------------


def test_the_verdict_names_the_worst_first() -> None:
    assert "✓ it scores all 8 samples" in plain(tried(size))
    assert "✗ it fails on 8 of 8 samples" in plain(tried(lambda sample: None))
    assert "✗ none of 2 groups would teach anything" in plain(tried(lambda sample: 1.0))
    many = rollout("12 34 56")
    once = tried(lambda s: float(s.response == "1"), on=many)
    assert "! only 1 of 3 groups would teach anything" in plain(once)


def test_the_distribution_is_drawn_and_told_in_words() -> None:
    page = html(tried(size))
    assert page.count("<svg") == 3  # the drawing, and a key for each of the two
    assert "0: 0 and 7; 0.125: 1 and 0" in page
    assert "1: 1 and 1" in page


def test_many_different_rewards_share_bins() -> None:
    page = html(tried(lambda s: 10.0**s.index, on=rollout("1" * 40)))
    assert page.count("<rect") <= 2 * 12 + 2


@pytest.mark.parametrize("value", [1e308, -1e308, 0.0, 1e-300])
def test_any_finite_reward_can_be_drawn(value: float) -> None:
    html(tried(lambda s: value * (-1) ** s.index * (1 - s.index / 50), on=rollout("1" * 40)))


def test_a_click_on_a_case_shows_the_sample_and_its_error() -> None:
    def look_up(sample: Sample) -> float:
        raise KeyError("answer")

    page = html(tried(look_up))
    assert "<summary>prompt 0 → 1 (answer: 4)</summary>" in page
    assert "<summary>traceback</summary>" in page
    assert "Sample 0 of prompt 0" in page


def test_the_same_response_to_the_same_prompt_is_one_row_with_its_count() -> None:
    page = html(tried(size, on=rollout("8888888 44")))
    _, table = page.split("Differences: 9 of 9 samples that both scored")
    assert '<td class="kv-num">7</td>' in table
    assert table.split("Slowest")[0].count("<summary>") == 2


def test_an_empty_rollout_shows_too() -> None:
    trial = tried(size, on=Rollout([]))
    assert "! the rollout has no samples" in plain(trial)
    html(trial)


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:16]))
def test_hostile_text_stays_in_its_place(text: str) -> None:
    def hostile(sample: Sample) -> float:
        if sample.index % 2:
            raise ValueError(text)
        return sample.index / 7

    hostile.__name__ = text[:99]
    samples = [
        replace(s, prompt=text, response=text, label=text, metadata={"token_texts": [text]})
        for s in rollout("12345678" * 64)
    ]
    trial = tried(hostile, "exact", Rollout(samples))
    assert_harmless(html(trial))
    assert len(html(trial)) < 1_000_000
    assert_visible(plain(trial))


def test_many_long_samples_and_messages_stay_under_a_megabyte() -> None:
    def hostile(sample: Sample) -> float:
        if sample.index % 2:
            raise ValueError(f"{sample.index} " + "<" * 9_000)
        return sample.index / 7

    text = "<b>&" * 2_500
    samples = [
        replace(s, prompt=[{"role": text, "content": text}] * 5, response=text, label=text)
        for s in rollout("12345678" * 64)
    ]
    assert len(html(tried(hostile, "exact", Rollout(samples))).encode()) < 1_000_000


# ---- in a session ------------------------------------------------------------------------------


def test_trying_changes_nothing_of_a_session(session: RLSession) -> None:
    last = session.score(session.generate())
    state = session.debug.state
    before = (session.step_count, state.rollouts_drawn, list(session.history), session.__repr__())
    trial = session.try_reward(lambda sample: sample.response_length)
    assert session.last_rollout is last
    assert before == (
        session.step_count, state.rollouts_drawn, list(session.history), session.__repr__(),
    )  # fmt: skip
    assert trial.against.rollout.rewards() == last.rewards(), "the session's own reward"
    assert trial.tried.rollout.rewards() == [float(s.response_length) for s in last]


def test_a_trial_takes_any_rollout_and_any_other_reward(session: RLSession) -> None:
    trial = session.try_reward("exact", rollout(), against=size)
    assert trial.against.name == "size"
    assert session.last_rollout is None


def test_without_a_rollout_a_trial_says_what_to_do(session: RLSession) -> None:
    with pytest.raises(SessionError, match=r"generate one first \(`session.generate\(\)`\)"):
        session.try_reward("exact")
