"""What `train` and `generate` are given beside their defaults, and what a session starts with."""

from __future__ import annotations

from pathlib import Path

import pytest

from kit import RLSession, Sample, SessionConfig, StepReport
from kit.checkpoint import checkpoint
from kit.errors import ConfigError, ModelError, RewardError, SessionError
from kit.models.source import find

FEW = {"rollout_batch_size": 2, "n_samples_per_prompt": 2}


def test_callbacks_see_each_step_may_call_verbs_and_cannot_end_the_training(
    session: RLSession,
) -> None:
    session.configure({"evaluation.max_prompts": 2}, **FEW)
    seen: list[tuple[int, int]] = []

    def look(report: StepReport) -> None:
        seen.append((report.step, session.evaluate().prompts))

    def plot(report: StepReport) -> None:
        raise ValueError("no display")

    with pytest.warns(RuntimeWarning, match=r"plot failed after step 1: ValueError: no display"):
        report = session.train(2, callbacks=[look, plot], show=False)
    assert len(report) == 2
    assert seen == [(0, 2), (1, 2)]


@pytest.mark.slow
def test_training_evaluates_before_its_first_step_unless_those_weights_were_evaluated(
    session: RLSession,
) -> None:
    session.configure({"evaluation.interval": 2, "evaluation.max_prompts": 2}, **FEW)
    steps = [[e.step for e in session.train(n, show=False).evaluations] for n in (3, 1, 1)]
    assert steps == [[0, 2], [3, 4], []]
    session.restore("first")
    session.configure({"evaluation.interval": 2, "evaluation.skip_eval_before_train": True}, **FEW)
    assert session.train(1, show=False).evaluations == ()
    session.configure({"evaluation.interval": 0, "evaluation.skip_eval_before_train": False})
    assert session.train(1, show=False).evaluations == ()


def test_a_reward_given_to_train_is_the_sessions_own_and_asked_for_again(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(sample: Sample) -> float:
        return 0.5 * (sample.index % 2)

    parts = session.debug
    monkeypatch.setattr(parts, "reward", parts.reward)
    monkeypatch.setattr(parts.state, "inputs", parts.state.inputs)
    session.configure(**FEW)
    (step,) = session.train(1, reward=half, show=False).steps
    assert step.metrics["rollout/raw_reward"] == 0.25
    assert {s.reward for s in session.step().rollout} == {0.0, 0.5}
    described = checkpoint.read(session.save(tmp_path / "one"))[1]["inputs"]
    assert described["reward"]["object"] == "half"
    with pytest.raises(RewardError):
        session.train(1, reward="no-such-reward", show=False)


def test_a_rollout_is_as_short_and_as_sure_as_is_asked(session: RLSession) -> None:
    short = session.generate(max_tokens=1)
    assert {s.response_length for s in short} == {1}
    sure = session.generate(["12+34="], n_samples_per_prompt=16, top_p=1e-6)
    assert len({s.response for s in sure}) == 1
    with pytest.raises(
        SessionError, match=r"(?s)max_tokens is 9999.*rollout\.max_response_len"
    ) as told:
        session.generate(max_tokens=9999)
    assert "tokens at most" in str(told.value)
    for wrong in ({"top_p": 0.0}, {"top_p": 2}, {"max_tokens": 0}):
        with pytest.raises(SessionError):
            session.generate(**wrong)


def test_a_model_can_be_named_where_a_configuration_is_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine.yaml").write_text("seed: 3\nmodel: ./mine\n")
    assert SessionConfig.of("tiny") == SessionConfig.preset("tiny")
    assert SessionConfig.of("./mine").model.name == "mine"
    assert SessionConfig.of(tmp_path / "mine").model.name == str(tmp_path / "mine")
    assert SessionConfig.of("Qwen/Qwen3-0.6B").model.name == "Qwen/Qwen3-0.6B"
    assert SessionConfig.of("mine.yaml").model.name == "./mine"
    assert SessionConfig(model=Path("mine")).model.name == "mine"  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"There is no configuration file 'nobody'"):
        SessionConfig.of("./nobody")
    with pytest.raises(ConfigError, match="Did you mean 'tiny'"):
        SessionConfig.of("tinny")


def test_a_checkpoint_where_a_model_is_meant_is_told_apart(
    session: RLSession, tmp_path: Path
) -> None:
    path = session.save(tmp_path / "saved")
    with pytest.raises(ModelError, match=r"(?s)checkpoint of a session.*RLSession\.load"):
        find(SessionConfig.of(path).model)
