"""What the rollout policies promise, on the real stack with the tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import RLSession, Sample, SessionConfig
from kit.data.buffer import unfinished
from kit.errors import ConfigError, SessionError
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
