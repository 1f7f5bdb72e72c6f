"""Partial rollout on the real stack: what was aborted goes on, and nothing is lost."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, Rollout, Sample, Status
from kit.checkpoint import checkpoint
from kit.data.buffer import Group, unfinished
from kit.data.prompts import PromptRow
from kit.errors import CheckpointError, RewardError
from kit.lifecycle.start import SessionParts
from kit.rollout.collector import GroupSelection
from tests.faults.interrupts import interrupted
from tests.policies import (
    LONGEST,
    SURPLUS,
    luck,
    policies,
    rambling,
    rewards_by_group,
    set_policies,
)

__all__ = ["policies", "rambling"]  # fixtures


def begun(session: RLSession) -> list[Sample]:
    """What waits in the buffer with tokens, but without an end."""
    waiting = session.debug.state.buffer.take(99)
    session.debug.state.buffer.put(waiting)
    return [s for group in waiting for s in group if unfinished(s) and s.response_length]


def until_begun(session: RLSession, verb: Callable[[], Any]) -> tuple[Any, list[Sample]]:
    """Call it until responses were stopped: all may have ended before the word to stop came."""
    for _ in range(50):
        result = verb()
        if stopped := begun(session):
            return result, stopped
    pytest.fail("nothing was stopped")


def test_aborted_responses_go_on_where_they_were_stopped_with_newer_weights(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS)
    trained, old = until_begun(session, session.generate)
    assert all(s.status is Status.ABORTED and s.weight_versions == [0] for s in old)
    assert (
        len(session.debug.state.buffer) == trained.metrics["rollout/partial/buffered_groups"] == 20
    )
    assert "waiting to be continued: 20" in repr(session)
    session.update(session.advantages(session.score(trained, reward=luck)))
    session.sync()

    *others, rollout = generate_until(session, lambda s: s.weight_versions == [0, 1])
    continued = [r.metrics["rollout/partial/continued"] for r in (*others, rollout)]
    assert 0 < next(filter(None, continued)) <= len(old)  # it may have waited as surplus before
    assert 0 < rollout.metrics["rollout/partial/off_policy_frac"] <= 1
    both = [s for s in rollout if s.weight_versions == [0, 1]]
    assert both
    for sample in both:
        first, second = sample.version_lengths
        before = next(s for s in old if starts_with(sample, s) and s.response_length == first)
        assert (first, first + second) == (before.response_length, sample.response_length)
        assert (sample.rollout_log_probs or [])[:first] == before.rollout_log_probs
        assert len(sample.metadata["token_texts"]) == sample.response_length <= LONGEST
        assert sample.response.startswith(before.response[:-1])
        assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
    cut = [s for s in both if s.status is Status.TRUNCATED]
    assert all(s.response_length == LONGEST for s in cut)


def generate_until(session: RLSession, wanted: Callable[[Sample], bool]) -> list[Rollout]:
    """Rollouts, the last of which has such a sample. Groups that finished while others were stopped
    come first.
    """
    rollouts: list[Rollout] = []
    while not rollouts or not any(map(wanted, rollouts[-1])):
        assert len(rollouts) < 200
        rollouts.append(session.generate())
    return rollouts


def test_every_prompt_that_was_drawn_is_answered_once_or_waits(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS)
    shown: list[str] = []
    for _ in range(5):
        shown += [group[0].prompt_text for group in session.generate().groups()]
    waiting = [group[0].prompt_text for group in session.debug.state.buffer.take(99)]
    drawn = session.debug.state.stream.state()["position"]
    assert len({*shown, *waiting}) == len(shown) + len(waiting) == drawn


def starts_with(sample: Sample, begin: Sample) -> bool:
    return (
        sample.tokens[: len(begin.tokens)] == begin.tokens
        and (sample.rollout_log_probs or [])[: begin.response_length] == begin.rollout_log_probs
    )


def went_on(sample: Sample) -> bool:
    return len(sample.weight_versions) > 1


def trainer_gap(session: RLSession, samples: list[Sample]) -> float:
    """Largest |trainer - engine| log-prob of the tokens that the masks leave."""
    values = session.log_probs(samples)
    return max(
        abs(train - (sample.rollout_log_probs or [])[place])
        for sample, row in zip(samples, values, strict=True)
        for place, train in enumerate(row)
        if sample.mask[place]
    )


@pytest.mark.slow
def test_each_token_has_the_log_prob_of_the_weights_that_wrote_it(
    reseeded: Callable[[int], RLSession],
) -> None:
    session = reseeded(0)  # at temperature 1, as the trainer computes
    set_policies(session, **SURPLUS)
    rounds = (session.generate() for _ in range(200))  # most responses are short
    assert any(begun(session) for _ in rounds)
    assert trainer_gap(session, begun(session)) < 1e-4
    prompts = [f"{n}+{n + 7}=" for n in range(30, 70)]
    for _ in range(5):  # far enough for a few tokens to show it
        session.update(session.advantages(session.score(session.generate(prompts), reward=luck)))
    session.sync()
    rollout = generate_until(session, lambda s: s.weight_versions == [0, 5])[-1]
    both = [s for s in rollout if s.weight_versions == [0, 5]]
    own = [s.masked_to(5) for s in both]
    assert trainer_gap(session, own) < 1e-4
    assert trainer_gap(session, both) > 1e-4


@pytest.mark.slow
def test_tokens_of_older_weights_are_masked_where_it_is_asked_for(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS, mask_offpolicy_in_partial_rollout=True)
    first, _ = until_begun(session, session.generate)
    first = session.score(first, reward=luck)
    assert all(s.loss_mask is None for s in first)
    session.update(session.advantages(first))
    session.sync()
    rollout = generate_until(session, lambda s: s.weight_versions == [0, 1])[-1]
    rollout = session.score(rollout, reward=luck)
    for sample in rollout:
        wrote = [version for version, count in sample.spans for _ in range(count)]
        assert sample.mask == [int(version == 1) for version in wrote]
    assert session.update(session.advantages(rollout)).applied


def written(parts: SessionParts, rows: list[PromptRow]) -> Rollout:
    """Four whole responses to each row."""
    settings = parts.sampler.sampling()
    return parts.sampler.write(parts.stack, rows, 4, settings, "waiting", 0).complete()


def test_what_the_mask_would_empty_is_written_anew(policies: Callable[..., RLSession]) -> None:
    session = policies(**SURPLUS, mask_offpolicy_in_partial_rollout=True)
    parts = session.debug
    rows = parts.state.stream.next(4)
    waiting = written(parts, rows)
    session.debug.state.buffer.put(map(tuple, waiting.groups()))
    session.update(session.advantages(session.score(waiting, reward=luck)))
    session.sync()
    rollout = generate_until(session, lambda s: s.prompt == waiting[0].prompt)[-1]
    again = [s for s in rollout if s.prompt in {w.prompt_text for w in waiting}]
    assert all(s.weight_versions == [1] and all(s.mask) for s in again)
    assert all(len(s.tokens) == len(s.prompt_tokens) + s.response_length for s in again)


@pytest.mark.slow
def test_a_checkpoint_holds_the_buffer_and_training_goes_on_with_it(
    policies: Callable[..., RLSession], rambling: None, tmp_path: Path
) -> None:
    session = policies(**SURPLUS)
    _, waiting = until_begun(session, session.step)
    groups = session.debug.state.buffer.state()
    path = session.save(tmp_path / "one")
    session.train(1, show=False)
    assert session.debug.state.buffer.state() != groups

    config, state = checkpoint.read(path)
    assert config.rollout.partial_rollout
    checkpoint.restore(session.debug.state, session.debug.stack, path, state)
    assert session.debug.state.buffer.state() == groups
    rollouts = generate_until(session, went_on)
    assert any(starts_with(s, w) for r in rollouts for s in r if went_on(s) for w in waiting)
    assert session.step().update.applied


@pytest.mark.filterwarnings("ignore:Where the session stands")
def test_metadata_that_json_does_not_know_is_named_when_the_buffer_is_saved(
    session: RLSession, tmp_path: Path
) -> None:
    session.debug.state.buffer.put([(Sample(metadata={"when": object()}),)])
    with pytest.raises(CheckpointError, match="metadata of a prompt"):
        session.save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_loses_nothing_that_was_begun_and_leaves_the_engine_free(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(**SURPLUS)
    prompting = session.debug.sampler
    before = prompting.config, prompting.max_response_len
    prompting.config = prompting.config.replace("rollout.temperature", 50.0)
    prompting.max_response_len = 480
    try:
        for after in (0.3, 0.7, 1.5, 3.0, 0.5, 1.0, 2.0):  # a busy machine is now early, now late
            session.debug.state.buffer.take(99)
            begin, finished = session.debug.state.stream.state()["position"], list[Rollout]()
            assert interrupted(lambda done=finished: generate_on(session, done), after)
            if begun(session):
                break
    finally:
        prompting.config, prompting.max_response_len = before
    assert begun(session)
    drawn = session.debug.state.stream.state()["position"] - begin
    # The last one may have been done, and not yet kept here.
    assert drawn - len(session.debug.state.buffer) - 4 * len(finished) in (0, 4)
    assert session.check_mismatch(session.generate(["1+1="])).verdict == "pass"


def generate_on(session: RLSession, done: list[Rollout]) -> None:
    while True:
        done.append(session.generate())


def test_a_reward_function_that_is_wrong_loses_nothing_that_was_generated(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS, dynamic_sampling=True)

    def short(samples: list[Sample]) -> list[float]:
        return [1.0]

    with pytest.raises(RewardError):
        session.collect(reward=short)
    assert len(session.debug.state.buffer) == 24
    finished = [g for g in session.debug.state.buffer.take(24) if not any(map(unfinished, g))]
    assert finished
    assert all(s.reward is None for group in finished for s in group)
    session.debug.state.buffer.put(finished)
    assert len(session.collect(reward=luck).groups()) == 4


def test_finished_groups_that_wait_are_taken_before_anything_new_is_drawn(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(**SURPLUS)
    parts = session.debug
    rows = parts.state.stream.next(4)
    waiting = written(parts, rows)
    session.debug.state.buffer.put(map(tuple, waiting.groups()))
    before = session.debug.state.stream.state()
    rollout = session.generate()
    assert [s.response for s in rollout] == [s.response for s in waiting]
    assert rollout.new_tokens == 0
    assert session.debug.state.stream.state() == before
    assert len(session.debug.state.buffer) == 0


def test_an_interrupt_between_buffer_and_engine_loses_no_group(
    policies: Callable[..., RLSession], monkeypatch: pytest.MonkeyPatch
) -> None:
    session = policies(**SURPLUS)
    rows = session.debug.state.stream.next(4)
    waiting = written(session.debug, rows)
    session.debug.state.buffer.put(map(tuple, waiting.groups()))
    reset, pressed = GroupSelection.reset_if_masked, list[int]()

    def press(self: GroupSelection, group: Group) -> Group:
        if not pressed:
            pressed.append(1)
            signal.raise_signal(signal.SIGINT)
        return reset(self, group)

    monkeypatch.setattr(GroupSelection, "reset_if_masked", press)
    with pytest.raises(KeyboardInterrupt):
        session.generate()
    assert len(session.debug.state.buffer) == 4
    assert [s.response for s in session.generate()] == [s.response for s in waiting]


@pytest.mark.slow
def test_all_policies_together_train(
    policies: Callable[..., RLSession], rambling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = policies(**SURPLUS, dynamic_sampling=True, mask_offpolicy_in_partial_rollout=True)
    monkeypatch.setattr(session.debug, "reward", luck)
    session.debug.state.config = session.config.replace("mismatch.interval", 1)
    for step in session.train(3, show=False):
        assert len(step.rollout.groups()) == 4
        assert all(len(rewards) > 1 for rewards in rewards_by_group(step.rollout))
        assert step.update.applied
        assert all(map(math.isfinite, step.metrics.values()))
