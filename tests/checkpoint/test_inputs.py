"""What was passed to `start` as objects is asked for again, whoever continues."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.checkpoint import checkpoint
from kit.checkpoint.inputs import Inputs
from kit.errors import CheckpointError, SessionError
from kit.lifecycle import resume
from kit.samples import Sample

ROWS = [{"prompt": "1+1=", "label": "2"}]


def short(sample: Sample, limit: int = 3) -> float:
    return float(sample.response_length <= limit)


class Judge:
    def __call__(self, sample: Sample) -> float:
        return float(bool(sample.response))


def again(inputs: Inputs, **given: Any) -> dict[str, Any]:
    every = {"data": None, "eval_data": None, "reward": None} | given
    return inputs.again(every, SessionError, "The session 'a'", "RLSession.attach('a', ...)")


@pytest.mark.parametrize(
    ("reward", "named"),
    [(short, "(short)"), (partial(short, limit=5), "(short)"), (Judge(), "(Judge)")],
)
def test_a_function_has_to_be_passed_again_and_is_named(reward: Any, named: str) -> None:
    inputs = Inputs.of(data=ROWS, eval_data=None, reward=reward)
    with pytest.raises(SessionError) as told:
        again(inputs)
    assert "training prompts (list) and a reward function " + named in str(told.value)
    assert "`RLSession.attach('a', data=..., reward=...)`" in str(told.value)
    with pytest.raises(SessionError, match=r"attach\('a', data=\.\.\.\)"):
        again(inputs, reward=short)
    given = {"data": ROWS, "reward": reward}
    assert again(inputs, **given) == {"eval_data": None, **given}


@pytest.mark.parametrize("reward", ["number", {"math": 0.9, "format": 0.1}])
def test_names_weights_and_paths_are_taken_again(reward: Any, tmp_path: Path) -> None:
    inputs = Inputs.of(data=tmp_path / "rows.jsonl", eval_data=None, reward=reward)
    taken = {"data": str(tmp_path / "rows.jsonl"), "eval_data": None, "reward": reward}
    assert again(inputs) == taken
    assert again(inputs, reward=short)["reward"] is short


def test_another_function_of_the_same_name_is_told_from_it() -> None:
    first = Inputs.of(reward=short)

    def other(sample: Sample) -> float:
        return 0.0

    other.__name__ = "short"
    assert Inputs.of(reward=short) == first
    assert Inputs.of(reward=other) != first


def test_a_checkpoint_of_a_session_with_a_reward_of_its_own_is_not_continued_without_it(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = session.debug.state
    with monkeypatch.context() as patch:
        patch.setattr(state, "inputs", Inputs.of(reward=short, eval_data=ROWS))
        path = session.save(tmp_path / "own")
        session.step()
        session.restore(path)
        assert session.step_count == 0
        asked = r"(?s)held-out prompts \(list\) and a reward function \(short\)|reward=\.\.\."
        with pytest.raises(CheckpointError, match=asked) as told:
            RLSession.load(path)  # before any process is started
        assert f"RLSession.load({str(path)!r}, eval_data=..., reward=...)" in str(told.value)
    with pytest.raises(CheckpointError, match=r"\(short\) of its own, and this one was not"):
        session.restore(path)
    session.step()


def test_a_run_is_not_resumed_with_another_reward(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, parts = session.save(tmp_path / "one"), session.debug
    resume.load(parts.state, parts.stack, parts.use, path, checkpoint.read(path))
    monkeypatch.setattr(parts.state, "inputs", Inputs.of(reward=short))
    with pytest.raises(CheckpointError, match=r"(?s)other data, reward.*'short'"):
        resume.load(parts.state, parts.stack, parts.use, path, checkpoint.read(path))
