"""Settings that change while a session runs: they act, are written down, and are taken back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import RLSession
from kit.checkpoint import checkpoint
from kit.errors import CheckpointError, ConfigError, SessionError
from kit.lifecycle import resume
from kit.reports.runs import RunSettings
from kit.tracking.recorder import Recorder
from kit.tracking.run_folder import read_rows


def test_a_configuration_in_place_of_the_sessions_is_refused(session: RLSession) -> None:
    before = session.config
    with pytest.raises(SessionError, match=r"(?s)cannot be replaced.*session\.configure"):
        session.config = before.replace("training.learning_rate", 1e-5)
    assert session.config is before


def test_changed_settings_act_from_the_next_verb_on(session: RLSession) -> None:
    changed = session.configure(
        {"rollout.temperature": 0.7}, learning_rate=2e-4, rollout_batch_size=4, global_batch_size=16
    )
    step = session.step()
    assert (step.metrics["train/lr"], len(step.rollout), len(step.update.per_step)) == (2e-4, 32, 2)
    # Engine and trainer both divide by the new temperature.
    assert step.metrics["train/train_rollout_logprob_abs_diff"] < 1e-5
    assert session.check_mismatch().verdict == "pass"
    assert ("rollout.temperature", 1.0, 0.7) in changed.changes
    assert "training.learning_rate: 0.0001 -> 0.0002" in str(changed)
    assert "Nothing changed" in str(session.configure(learning_rate=2e-4))


def test_what_is_refused_changes_nothing(session: RLSession) -> None:
    before = session.config
    for changes in ({"learning_rate": 1e-4, "num_trainers": 2}, {"learning_rate": -1}, {}):
        with pytest.raises(ConfigError):
            session.configure(changes)
    assert session.config == before
    assert session.debug.state.changes == []


@pytest.mark.slow
def test_changes_are_written_down_and_go_with_a_checkpoint(
    session: RLSession, tmp_path: Path
) -> None:
    tracker = session.debug.tracker
    tracker.recorder = Recorder(tmp_path / "run")
    try:
        session.step()
        session.configure(learning_rate=2e-4)
    finally:
        tracker.recorder = None
    rate = {"setting": "training.learning_rate", "from": 1e-4, "to": 2e-4}
    row = {"step": 1, **rate}
    assert json.loads((tmp_path / "run" / "changes.jsonl").read_text()) == row
    config, state = checkpoint.read(session.save(tmp_path / "one"))
    assert config.training.learning_rate == 2e-4
    assert state["changes"] == [row]
    session.restore("first")
    assert (session.config.training.learning_rate, session.debug.state.changes) == (1e-4, [])
    session.restore(tmp_path / "one", changes={"learning_rate": 5e-5})
    assert session.step().metrics["train/lr"] == 5e-5
    assert [each["to"] for each in session.debug.state.changes] == [2e-4, 5e-5]
    with pytest.raises(ConfigError):
        session.restore("first", changes={"learning_rate": -1})
    assert session.step_count == 2  # nothing was undone


@pytest.mark.slow
def test_a_run_is_resumed_with_what_was_changed_while_it_ran_and_with_no_other_change(
    session: RLSession, tmp_path: Path
) -> None:
    """The notebook starts its session as it did; what its training changed is in the checkpoint."""
    parts = session.debug
    session.configure(n_samples_per_prompt=4)
    session.step()
    session.configure(learning_rate=2e-4)
    path = session.save(tmp_path / "one")
    session.restore("first")
    with pytest.raises(CheckpointError, match="other settings"):
        resume.load(parts.state, parts.stack, parts.use, path, checkpoint.read(path), begin=1)
    session.configure(n_samples_per_prompt=4)
    resume.load(parts.state, parts.stack, parts.use, path, checkpoint.read(path), begin=1)
    assert (session.step_count, session.config.training.learning_rate) == (1, 2e-4)
    session.restore("first")
    resume.load(
        parts.state,
        parts.stack,
        parts.use,
        path,
        checkpoint.read(path),
        1,
        ["n_samples_per_prompt"],
    )
    assert session.config.training.n_samples_per_prompt == 4


def test_settings_given_to_a_resumed_run_change_once_where_its_first_training_continues(
    session: RLSession, tmp_path: Path
) -> None:
    parts, recorder = session.debug, Recorder(tmp_path)
    changes = {"training.learning_rate": 5e-5}
    recorder.settings = RunSettings(attempt=2, folder=str(tmp_path), changes=changes)
    (tmp_path / "attempts").mkdir()
    assert resume.begin_training(parts.state, parts.stack, recorder, parts.use, 4) == 0
    assert session.config.training.learning_rate == 5e-5
    session.configure(learning_rate=2e-4)  # by the notebook, before its second training
    resume.begin_training(parts.state, parts.stack, recorder, parts.use, 4)
    assert session.config.training.learning_rate == 2e-4
    (row,) = read_rows(tmp_path / "changes.jsonl")
    assert (row["setting"], row["to"]) == ("training.learning_rate", 5e-5)
