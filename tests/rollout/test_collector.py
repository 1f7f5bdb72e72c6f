"""What the rollout policies promise, on the real stack with the tiny model."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kit import RLSession, Sample, SessionConfig, Status
from kit.data.buffer import unfinished
from kit.data.prompts import PromptRow, PromptSet
from kit.data.stream import PromptStream
from kit.errors import ConfigError, DataError, RewardError, SessionError
from tests.policies import (
    SURPLUS,
    luck,
    policies,
    rambling,
    rewards_by_group,
    set_policies,
)
from tests.steps import responses_and_metrics

__all__ = ["policies", "rambling"]  # fixtures


# ---- dynamic sampling --------------------------------------------------------------------------


def test_dynamic_sampling_fills_the_batch_with_groups_that_teach_something(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(dynamic_sampling=True)
    rollout = session.collect()
    assert rewards_by_group(rollout) == [{0.0, 1.0}] * 16
    assert [s.index for s in rollout] == list(range(128))
    assert [s.group_index for s in rollout] == [i // 8 for i in range(128)]
    metrics = rollout.metrics
    assert metrics["rollout/dynamic_sampling/rounds"] >= 2
    dropped = metrics["rollout/dynamic_sampling/dropped_groups"]
    equal = [v for name, v in metrics.items() if name.startswith("rollout/zero_std/count_")]
    assert dropped == sum(equal) >= 1
    assert metrics["rollout/dynamic_sampling/missing_groups"] == 0
    assert rollout.new_tokens > sum(s.response_length for s in rollout)
    assert rollout.notes == ()
    report = session.update(session.advantages(rollout))
    assert (report.samples, report.left_out) == (128, ())
    assert session.last_rollout is rollout


@pytest.mark.slow
def test_dynamic_sampling_with_the_same_seed_gives_the_same_steps(
    reseeded: Callable[[int], RLSession],
) -> None:
    runs = []
    for _ in range(2):
        session = reseeded(3)
        set_policies(session, dynamic_sampling=True)
        steps = session.train(2, show=False).steps
        runs.append(responses_and_metrics(steps))
    assert runs[0] == runs[1]


def test_without_policies_collecting_is_generating_and_scoring(
    reseeded: Callable[[int], RLSession],
) -> None:
    collected = reseeded(5).collect()
    session = reseeded(5)
    assert collected.samples == session.score(session.generate()).samples
    assert collected.metrics == {}


def test_a_batch_that_cannot_be_filled_trains_as_it_is_and_names_the_setting(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(dynamic_sampling=True, dynamic_sampling_max_rounds=1)
    report = session.step()
    groups = len(report.rollout.groups())
    assert 0 < groups < 16
    assert report.update.samples == 8 * groups
    assert report.metrics["rollout/dynamic_sampling/missing_groups"] == 16 - groups
    shown = report._repr_mimebundle_()
    for words in shown.values():
        assert "rollout.dynamic_sampling_max_rounds" in words
    assert f"{groups} of 16 groups" in report.rollout._repr_mimebundle_()["text/plain"]


def test_prompts_that_teach_nothing_end_in_an_error_after_the_configured_rounds(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(dynamic_sampling=True, dynamic_sampling_max_rounds=3)
    before = session.debug.state.stream.state()["position"]
    with pytest.raises(SessionError, match=r"raise rollout\.dynamic_sampling_max_rounds") as caught:
        session.collect(reward=lambda sample: 1.0)
    assert "48 of 48 groups had equal rewards" in str(caught.value)
    assert session.debug.state.stream.state()["position"] == before + 3 * 16


def test_a_failed_reward_is_not_hidden_by_drawing_again(policies: Callable[..., RLSession]) -> None:
    session = policies(dynamic_sampling=True)

    def fragile(sample: Sample) -> float:
        if sample.group_index == 2:
            raise ValueError("no label here")
        return luck(sample)

    rollout = session.collect(reward=fragile)
    assert len(rollout.failed()) == 8
    assert len(rollout.groups()) == 16
    (reason,) = session.advantages(rollout).left_out
    assert "no label here" in reason


# ---- scored while others are written -----------------------------------------------------------


@pytest.fixture
def in_parts(session: RLSession, rambling: None) -> Iterator[RLSession]:
    """The running session; its next rollout takes long, and is handed over in parts."""
    prompting = session.debug.sampler
    prompting.max_response_len, before = 480, prompting.max_response_len
    prompting.last_stream = None
    yield session
    prompting.max_response_len = before
    prompting.last_stream = None


def test_scoring_while_others_are_written_changes_nothing_but_the_time(
    reseeded: Callable[[int], RLSession], rambling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollouts, positions = [], []
    for at_once in (False, True):
        # Whether the last rollout was a short one decides which way is taken.
        monkeypatch.setattr("kit.rollout.sampler.SHORT", 1e9 if at_once else 0.0)
        session = reseeded(5)
        if at_once:
            session.generate(["12+34="], n_samples_per_prompt=1, temperature=0)
            assert session.debug.sampler.last_stream
            session = reseeded(5)
            rollouts.append(session.score(session.generate(), luck))
        else:
            session.debug.sampler.last_stream = None
            rollouts.append(session.collect(luck))
        positions.append(session.debug.state.stream.state())
    assert rollouts[0].samples == rollouts[1].samples
    assert rollouts[0].metrics == rollouts[1].metrics
    assert positions[0] == positions[1]
    assert len({s.response_length for s in rollouts[0]}) > 16


def test_the_first_responses_are_scored_before_the_last_are_written(in_parts: RLSession) -> None:
    calls: list[Sample] = []
    aborted: list[Sample] = []

    def stops_the_others(sample: Sample) -> float:
        if not calls:
            in_parts.debug.stack.engines.abort()
        calls.append(sample)
        return 1.0

    for _ in range(50):  # on a busy machine this process may be too late to stop any
        in_parts.debug.sampler.last_stream = None
        calls.clear()
        rollout = in_parts.collect(stops_the_others)
        aborted = [s for s in rollout if s.status is Status.ABORTED]
        assert len(calls) + len(aborted) == len(rollout) == 128
        if aborted:
            break
    assert aborted
    assert all(s.response_length == len(s.rollout_log_probs or []) for s in aborted)
    assert all(s.reward is None for s in aborted)


def test_a_reward_of_all_samples_is_called_once_with_all_of_them(in_parts: RLSession) -> None:
    seen: list[list[int]] = []

    def by_rank(samples: list[Sample]) -> list[float]:
        seen.append([s.index for s in samples])
        return [float(i) for i in range(len(samples))]

    rollout = in_parts.collect(by_rank)
    assert seen == [list(range(128))]
    assert rollout.rewards() == [float(i) for i in range(128)]


def test_a_reward_that_fails_is_data_while_others_are_written(in_parts: RLSession) -> None:
    def fragile(sample: Sample) -> float:
        if sample.index % 10 == 3:
            raise ValueError("no label here")
        return luck(sample)

    rollout = in_parts.collect(fragile)
    assert [s.index for s in rollout.failed()] == list(range(3, 128, 10))
    assert all("no label here" in str(s.error) for s in rollout.failed())
    assert len(rollout.rewards()) == 128 - 13


def test_async_rewards_of_different_parts_wait_together(in_parts: RLSession) -> None:
    waiting, together = 0, asyncio.Event()

    async def judge(sample: Sample) -> float:
        nonlocal waiting
        waiting += 1
        if waiting == 30:  # more than are finished in the first moment
            together.set()
        await together.wait()
        return luck(sample)

    rollout = in_parts.collect(judge)
    assert [s.reward for s in rollout] == [luck(s) for s in rollout]


@pytest.mark.parametrize("kind", ["in the reward", "while waiting for the engine"])
def test_an_interrupt_keeps_what_is_written_and_scored(in_parts: RLSession, kind: str) -> None:
    calls: list[int] = []
    notebook = threading.get_ident()

    def hangs(sample: Sample) -> float:
        calls.append(sample.index)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return 0.5

    async def interrupts(sample: Sample) -> float:
        calls.append(sample.index)
        if len(calls) == 3:
            signal.pthread_kill(notebook, signal.SIGINT)
        return 0.5

    with pytest.raises(KeyboardInterrupt):
        in_parts.collect(hangs if kind == "in the reward" else interrupts)
    kept = in_parts.last_rollout
    assert kept is not None
    scored = {s.index for s in kept if s.reward == 0.5}
    assert set(calls[:2]) <= scored <= set(calls)
    assert [s.index for s in kept] == list(range(128))  # with those that the engine left unfinished
    assert all(len(s.metadata["token_texts"]) == s.response_length for s in kept)
    assert in_parts.check_mismatch(in_parts.generate(temperature=1.0)).verdict == "pass"


def test_a_reward_that_cannot_be_called_is_refused_before_anything_is_drawn(
    session: RLSession,
) -> None:
    before = session.debug.state.stream.state()
    with pytest.raises(RewardError, match="nothing says what it wants"):
        session.collect(lambda: 1.0)
    assert session.debug.state.stream.state() == before


def test_the_next_prompts_are_tokens_already_when_it_is_their_turn(session: RLSession) -> None:
    session.debug.sampler.rendered.clear()
    session.collect()
    tokens = session.debug.sampler.rendered
    assert {repr(row.prompt) for row in session.debug.state.stream.next(16)} <= set(tokens)


def test_a_prompt_that_is_too_long_is_told_when_it_is_its_turn(session: RLSession) -> None:
    rows = [PromptRow("12+34=", "46", {}, n) for n in range(1, 17)]
    rows.append(PromptRow("9" * 600, "1", {}, 17))
    session.debug.state.stream = PromptStream(PromptSet("sums", rows), shuffle=False)
    assert len(session.collect()) == 128
    with pytest.raises(DataError, match="Row 17"):
        session.collect()


# ---- over-sampling -----------------------------------------------------------------------------


def test_over_sampling_returns_whole_groups_and_stops_the_rest(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(over_sampling_batch_size=48)
    for _ in range(5):  # where this process had no turn for long, all groups are finished at once
        before = session.debug.state.stream.state()["position"]
        rollout = session.generate()
        if rollout.metrics["rollout/aborted"]:
            break
    assert [len(group) for group in rollout.groups()] == [8] * 16
    assert not any(map(unfinished, rollout))
    assert all(s.response_length == len(s.rollout_log_probs or []) > 0 for s in rollout)
    assert [s.index for s in rollout] == list(range(128))
    assert rollout.metrics["rollout/aborted"] > 0
    assert rollout.new_tokens > sum(s.response_length for s in rollout)
    assert session.debug.state.stream.state()["position"] == before + 48
    assert len(session.debug.state.buffer) == 0
    assert session.update(session.advantages(session.score(rollout))).samples == 128


def test_prompts_of_ones_own_are_all_answered(policies: Callable[..., RLSession]) -> None:
    session = policies(**SURPLUS)
    rollout = session.generate(["12+34="] * 20)
    assert len(rollout) == 80
    assert rollout.metrics == {}
    assert len(session.generate(n_samples_per_prompt=2)) == 8


@pytest.mark.slow
def test_over_sampling_judges_groups_as_they_finish(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(over_sampling_batch_size=24, dynamic_sampling=True)

    def even_prompts_only(sample: Sample) -> float:
        return luck(sample) if int(sample.prompt_text[0]) % 2 else 1.0

    rollout = session.collect(reward=even_prompts_only)
    assert rewards_by_group(rollout) == [{0.0, 1.0}] * 16
    assert all(int(s.prompt_text[0]) % 2 for s in rollout)
    assert rollout.metrics["rollout/dynamic_sampling/rounds"] >= 2
    assert rollout.metrics["rollout/dynamic_sampling/dropped_groups"] >= 1


# ---- settings ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollout", "says"),
    [
        ({"over_sampling_batch_size": 8}, "over_sampling_batch_size is 8, fewer than the 16"),
        ({"partial_rollout": True}, "over_sampling_batch_size is None"),
        ({"partial_rollout": True, "over_sampling_batch_size": 16}, "such as 32"),
        ({"mask_offpolicy_in_partial_rollout": True}, "without partial_rollout"),
        ({"dynamic_sampling_max_rounds": 0}, "dynamic_sampling_max_rounds is 0"),
    ],
)
def test_policies_that_would_do_nothing_are_refused_with_the_way_out(
    rollout: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        SessionConfig(rollout=rollout)


def test_policies_that_go_together_are_taken() -> None:
    together = {"partial_rollout": True, "over_sampling_batch_size": 16, "dynamic_sampling": True}
    config = SessionConfig(rollout=together)
    assert config.samples_at_once == 128
    assert config.replace("rollout.over_sampling_batch_size", 40).samples_at_once == 320
