"""What the rollout policies promise, on the real stack with the tiny model."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, Rollout, Sample, SessionConfig, Status, checkpoint
from kit.data.buffer import unfinished
from kit.errors import CheckpointError, ConfigError, RewardError, SessionError

SURPLUS = {"over_sampling_batch_size": 24, "partial_rollout": True}
LONGEST = 120
FEW = {"rollout_batch_size": 4, "n_samples_per_prompt": 4}
"""A rollout of 16 samples: most of a surplus is not finished when it is full."""


def set_policies(session: RLSession, **settings: Any) -> None:
    tree = session.config.model_dump()
    tree["rollout"] |= settings
    if settings.get("partial_rollout"):
        tree["training"] |= FEW
    session.config = SessionConfig(**tree)


@pytest.fixture
def policies(session: RLSession) -> Callable[..., RLSession]:
    """Gives the running session with these settings of `rollout`."""

    def with_settings(**settings: Any) -> RLSession:
        set_policies(session, **settings)
        return session

    return with_settings


@pytest.fixture
def rambling(session: RLSession) -> Iterator[None]:
    """Responses of very different lengths: noise that ends when it happens to."""
    prompting = session._prompting
    before = prompting.config, prompting.max_response_len
    prompting.config = prompting.config.replace("rollout.temperature", 6.0)
    prompting.max_response_len = LONGEST
    yield
    prompting.config, prompting.max_response_len = before


def luck(sample: Sample) -> float:
    """A reward that differs in nearly every group, whatever the model writes."""
    return float(sum(sample.response_tokens) % 2)


def rewards_by_group(rollout: Rollout) -> list[set[float | None]]:
    return [{s.reward for s in group} for group in rollout.groups()]


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


def test_dynamic_sampling_with_the_same_seed_gives_the_same_steps(
    reseeded: Callable[[int], RLSession],
) -> None:
    runs = []
    for _ in range(2):
        session = reseeded(3)
        set_policies(session, dynamic_sampling=True)
        steps = session.train(2, show=False).steps
        responses = [[(s.response, s.rollout_log_probs) for s in step.rollout] for step in steps]
        numbers = [
            {k: v for k, v in step.metrics.items() if not k.startswith("perf/")} for step in steps
        ]
        runs.append((responses, numbers))
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
    before = session._stream.state()["position"]
    with pytest.raises(SessionError, match=r"raise rollout\.dynamic_sampling_max_rounds") as caught:
        session.collect(reward=lambda sample: 1.0)
    assert "48 of 48 groups had equal rewards" in str(caught.value)
    assert session._stream.state()["position"] == before + 3 * 16


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


# ---- over-sampling -----------------------------------------------------------------------------


def test_over_sampling_returns_whole_groups_and_stops_the_rest(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(over_sampling_batch_size=48)
    before = session._stream.state()["position"]
    rollout = session.generate()
    assert [len(group) for group in rollout.groups()] == [8] * 16
    assert not any(map(unfinished, rollout))
    assert all(s.response_length == len(s.rollout_log_probs or []) > 0 for s in rollout)
    assert [s.index for s in rollout] == list(range(128))
    assert rollout.metrics["rollout/aborted"] > 0
    assert rollout.new_tokens > sum(s.response_length for s in rollout)
    assert session._stream.state()["position"] == before + 48
    assert len(session._buffer) == 0
    assert session.update(session.advantages(session.score(rollout))).samples == 128


def test_prompts_of_ones_own_are_all_answered(policies: Callable[..., RLSession]) -> None:
    session = policies(**SURPLUS)
    rollout = session.generate(["12+34="] * 20)
    assert len(rollout) == 80
    assert rollout.metrics == {}
    assert len(session.generate(n_samples_per_prompt=2)) == 8


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


# ---- partial rollout ---------------------------------------------------------------------------


def begun(session: RLSession) -> list[Sample]:
    """What waits in the buffer with tokens, but without an end."""
    waiting = session._buffer.take(99)
    session._buffer.put(waiting)
    return [s for group in waiting for s in group if unfinished(s) and s.response_length]


def test_aborted_responses_go_on_where_they_were_stopped_with_newer_weights(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS)
    trained = session.generate()
    old = begun(session)
    assert old
    assert all(s.status is Status.ABORTED and s.weight_versions == [0] for s in old)
    assert len(session._buffer) == trained.metrics["rollout/partial/buffered_groups"] == 20
    assert "waiting to be continued: 20" in repr(session)
    session.update(session.advantages(session.score(trained, reward=luck)))
    session.sync()

    rollout = generate_until(session, lambda s: s.weight_versions == [0, 1])
    assert 0 < rollout.metrics["rollout/partial/continued"] <= len(old)
    assert 0 < rollout.metrics["rollout/partial/off_policy_frac"] <= 1
    both = [s for s in rollout if s.weight_versions == [0, 1]]
    assert both
    for sample in both:
        (before,) = [s for s in old if starts_with(sample, s)]
        first, second = sample.version_lengths
        assert (first, first + second) == (before.response_length, sample.response_length)
        assert (sample.rollout_log_probs or [])[:first] == before.rollout_log_probs
        assert len(sample.metadata["token_texts"]) == sample.response_length <= LONGEST
        assert sample.response.startswith(before.response[:-1])
        assert sample.status in (Status.COMPLETED, Status.TRUNCATED)
    cut = [s for s in both if s.status is Status.TRUNCATED]
    assert all(s.response_length == LONGEST for s in cut)


def generate_until(session: RLSession, wanted: Callable[[Sample], bool]) -> Rollout:
    """The next rollout with such a sample. Groups that finished while others were stopped come
    first.
    """
    rollouts = (session.generate() for _ in range(20))
    return next(rollout for rollout in rollouts if any(map(wanted, rollout)))


def test_every_prompt_that_was_drawn_is_answered_once_or_waits(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS)
    shown: list[str] = []
    for _ in range(5):
        shown += [group[0].prompt_text for group in session.generate().groups()]
    waiting = [group[0].prompt_text for group in session._buffer.take(99)]
    drawn = session._stream.state()["position"]
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


def test_each_token_has_the_log_prob_of_the_weights_that_wrote_it(
    reseeded: Callable[[int], RLSession],
) -> None:
    session = reseeded(0)  # at temperature 1, as the trainer computes
    set_policies(session, **SURPLUS)
    rounds = (session.generate() for _ in range(20))
    assert any(begun(session) for _ in rounds)
    assert trainer_gap(session, begun(session)) < 1e-4
    prompts = [f"{n}+{n + 7}=" for n in range(30, 70)]
    session.update(session.advantages(session.score(session.generate(prompts), reward=luck)))
    session.sync()
    rollout = generate_until(session, lambda s: s.weight_versions == [0, 1])
    both = [s for s in rollout if s.weight_versions == [0, 1]]
    own = [s.masked_to(1) for s in both]
    assert trainer_gap(session, own) < 1e-4
    assert trainer_gap(session, both) > 1e-4


def test_tokens_of_older_weights_are_masked_where_it_is_asked_for(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS, mask_offpolicy_in_partial_rollout=True)
    first = session.score(session.generate(), reward=luck)
    assert all(s.loss_mask is None for s in first)
    session.update(session.advantages(first))
    session.sync()
    rollout = generate_until(session, lambda s: s.weight_versions == [0, 1])
    rollout = session.score(rollout, reward=luck)
    for sample in rollout:
        wrote = [version for version, count in sample.spans for _ in range(count)]
        assert sample.mask == [int(version == 1) for version in wrote]
    assert session.update(session.advantages(rollout)).applied


def test_what_the_mask_would_empty_is_written_anew(policies: Callable[..., RLSession]) -> None:
    session = policies(**SURPLUS, mask_offpolicy_in_partial_rollout=True)
    waiting = session._prompting.generate(
        session._running, session._stream.next(4), 4, None, "waiting", 0
    )
    session._buffer.put(map(tuple, waiting.groups()))
    session.update(session.advantages(session.score(waiting, reward=luck)))
    session.sync()
    rollout = generate_until(session, lambda s: s.prompt == waiting[0].prompt)
    again = [s for s in rollout if s.prompt in {w.prompt_text for w in waiting}]
    assert all(s.weight_versions == [1] and all(s.mask) for s in again)
    assert all(len(s.tokens) == len(s.prompt_tokens) + s.response_length for s in again)


def test_a_checkpoint_holds_the_buffer_and_training_goes_on_with_it(
    policies: Callable[..., RLSession], rambling: None, tmp_path: Path
) -> None:
    session = policies(**SURPLUS)
    session.step()
    groups = session._buffer.state()
    assert begun(session)
    path = session.save(tmp_path / "one")
    session.train(1, show=False)
    assert session._buffer.state() != groups

    config, state = checkpoint.read(path)
    assert config.rollout.partial_rollout
    checkpoint.restore(session, session._running, path, state)
    assert session._buffer.state() == groups
    assert any(1 in s.weight_versions[1:] for s in generate_until(session, went_on))
    assert session.step().update.applied


def test_a_checkpoint_from_before_there_was_a_buffer_has_an_empty_one(
    session: RLSession, tmp_path: Path
) -> None:
    path = session.save(tmp_path / "one")
    _, state = checkpoint.read(path)
    del state["buffer"]
    checkpoint.restore(session, session._running, path, state)
    assert len(session._buffer) == 0


def test_metadata_that_json_does_not_know_is_named_when_the_buffer_is_saved(
    session: RLSession, tmp_path: Path
) -> None:
    session._buffer.put([(Sample(metadata={"when": object()}),)])
    with pytest.raises(CheckpointError, match="metadata of a prompt"):
        session.save(tmp_path / "one")
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_loses_nothing_that_was_begun_and_leaves_the_engine_free(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(**SURPLUS)
    prompting = session._prompting
    before = prompting.config, prompting.max_response_len
    prompting.config = prompting.config.replace("rollout.temperature", 50.0)
    prompting.max_response_len = 480
    timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            generate_until(session, lambda s: False)
    finally:
        timer.cancel()
        prompting.config, prompting.max_response_len = before
    assert 20 <= len(session._buffer) <= 24
    assert begun(session)
    assert session.check_mismatch(session.generate(["1+1="])).verdict == "pass"


def test_a_reward_function_that_is_wrong_loses_nothing_that_was_generated(
    policies: Callable[..., RLSession], rambling: None
) -> None:
    session = policies(**SURPLUS, dynamic_sampling=True)

    def short(samples: list[Sample]) -> list[float]:
        return [1.0]

    with pytest.raises(RewardError):
        session.collect(reward=short)
    assert len(session._buffer) == 24
    finished = [g for g in session._buffer.take(24) if not any(map(unfinished, g))]
    assert finished
    assert all(s.reward is None for group in finished for s in group)
    session._buffer.put(finished)
    assert len(session.collect(reward=luck).groups()) == 4


def test_finished_groups_that_wait_are_taken_before_anything_new_is_drawn(
    policies: Callable[..., RLSession],
) -> None:
    session = policies(**SURPLUS)
    waiting = session._prompting.generate(
        session._running, session._stream.next(4), 4, None, "waiting", 0
    )
    session._buffer.put(map(tuple, waiting.groups()))
    before = session._stream.state()
    rollout = session.generate()
    assert [s.response for s in rollout] == [s.response for s in waiting]
    assert rollout.new_tokens == 0
    assert session._stream.state() == before
    assert len(session._buffer) == 0


def test_all_policies_together_train(
    policies: Callable[..., RLSession], rambling: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = policies(**SURPLUS, dynamic_sampling=True, mask_offpolicy_in_partial_rollout=True)
    monkeypatch.setattr(session, "_reward", luck)
    session.config = session.config.replace("mismatch.interval", 1)
    for step in session.train(3, show=False):
        assert len(step.rollout.groups()) == 4
        assert all(len(rewards) > 1 for rewards in rewards_by_group(step.rollout))
        assert step.update.applied
        assert all(map(math.isfinite, step.metrics.values()))


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
