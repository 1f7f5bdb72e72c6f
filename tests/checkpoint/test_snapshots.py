"""Snapshot and undo on the real stack: everything comes back bit by bit, the engine with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.errors import CheckpointError, DataError, SessionError
from kit.reports import StepReport
from tests.steps import responses_and_metrics


def checksums(session: RLSession) -> tuple[Any, Any]:
    """Of the trainer's weights and of the engine's."""
    stack = session.debug.stack
    return stack.probe("checksums"), stack.checksums()


def steps(session: RLSession, count: int) -> list[StepReport]:
    return [session.step() for _ in range(count)]


@pytest.mark.slow
@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_done_again_after_an_undo_is_what_was_done_before(
    session: RLSession, on_disk: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    steps(session, 2)
    rollout, batch, before = session.last_rollout, session.last_batch, checksums(session)
    kept = session.snapshot("before", on_disk=on_disk)
    assert (kept.step, kept.folder is not None, kept.bytes > 1_000_000) == (2, on_disk, True)
    once = responses_and_metrics(steps(session, 3))
    assert checksums(session) != before

    assert session.restore("before") is kept
    assert (session.step_count, len(session.history)) == (2, 2)
    assert (session.last_rollout, session.last_batch) == (rollout, batch)
    assert checksums(session) == before  # of the engine as well
    assert session.check_mismatch(session.generate()).verdict == "pass"
    session.restore("before")
    assert responses_and_metrics(steps(session, 3)) == once


def test_an_undo_in_the_middle_of_a_step_gives_that_moment_back(session: RLSession) -> None:
    session.step()
    rollout = session.score(session.generate())
    session.snapshot("scored")
    batch = session.advantages(rollout)
    first = session.update(batch)
    session.restore("scored")
    assert session.last_rollout is rollout
    again = session.update(batch)
    assert (first.metrics, first.applied) == (again.metrics, again.applied)


@pytest.mark.slow
def test_two_updates_of_one_step_are_never_taken_for_each_other(session: RLSession) -> None:
    session.snapshot("before")
    session.step()
    of_one = session.last_rollout
    assert (session.step_count, session.weight_version, session.engine_version) == (1, 1, 1)
    session.generate()
    stale = session.last_rollout
    session.restore("before")
    assert (session.step_count, session.weight_version, session.engine_version) == (0, 0, 0)
    other = session.generate(["1+1="] * 4)
    session.update(session.advantages(session.score(other, reward=lambda s: float(s.index % 2))))
    assert (session.step_count, session.weight_version, session.engine_version) == (1, 2, 0)
    session.sync()
    assert stale
    assert of_one
    assert not stale.written_by({session.weight_version})  # though both are of step 1
    assert stale.step == session.step_count == 1
    report = session.check_mismatch(stale)
    assert (report.trainer_version, report.rollout_versions) == (2, (1,))
    session.debug.state.last_rollout = stale
    assert session.check_mismatch().verdict == "pass"  # it took a fresh one
    session.debug.state.last_rollout = stale.with_samples(s.reset_response() for s in stale)
    assert session.check_mismatch().tokens > 0  # and not one that was stopped before it began


def test_snapshots_show_what_can_be_restored_and_what_they_hold(session: RLSession) -> None:
    for name in list(session.snapshots()):
        assert name.name == "first"  # the tests' own
    session.step()
    unnamed = session.snapshot()
    assert unnamed.name == "step-1"
    assert session.snapshot().name == "step-1"  # the same weights: the same name, newer
    session.restore("first")
    session.step()
    assert session.snapshot().name.startswith("step-1-version-")
    found = session.snapshots()
    assert [s.name for s in found][:2] == ["first", "step-1"]
    assert found["step-1"].weight_version == 1
    assert found.host_bytes == sum(s.bytes for s in found)
    text = str(found)
    assert "= now" in text.splitlines()[2]
    assert "session.forget(name)" in text
    assert "session.restore('step-1')" in str(unnamed)
    session.forget("step-1")
    with pytest.raises(SessionError, match=r"no snapshot 'step-1'(.|\n)*step-1-version-"):
        session.restore("step-1")


def test_an_older_snapshot_of_a_name_is_not_taken_for_the_newer(session: RLSession) -> None:
    older = session.snapshot("a")
    session.step()
    session.snapshot("a")
    with pytest.raises(SessionError, match="was replaced by one of step 1"):
        session.restore(older)
    assert session.step_count == 1


@pytest.mark.parametrize("name", ["", "../a", "a/b", "x" * 81, ".hidden", 3])
def test_a_name_that_is_none_is_refused(session: RLSession, name: Any) -> None:
    with pytest.raises(SessionError, match="cannot be the name of a snapshot"):
        session.snapshot(name)


def test_a_snapshot_for_which_there_is_no_room_names_what_holds_it(session: RLSession) -> None:
    session.snapshot("one")
    session.configure({"memory.snapshots_gib": 0.005})
    with pytest.raises(SessionError, match=r"no room.*one \(") as caught:
        session.snapshot("two")
    assert "memory.snapshots_gib" in str(caught.value)
    assert "session.forget" in str(caught.value)
    session.configure({"memory.snapshots_gib": None})
    session.snapshot("two")


def test_settings_of_the_training_come_back_with_a_snapshot(session: RLSession) -> None:
    session.snapshot("before")
    before, rate = session.config, session.config.training.learning_rate
    session.configure({"rollout.temperature": 0.5}, learning_rate=10 * rate)
    assert session.step().metrics["train/lr"] == 10 * rate
    session.restore("before")
    assert session.config == before
    assert session.debug.sampler.sampling().temperature == before.rollout.temperature
    assert session.step().metrics["train/lr"] == rate


def test_a_snapshot_of_other_data_changes_nothing(session: RLSession) -> None:
    session.step()
    kept = session.snapshot("a")
    session.step()
    before, stood = checksums(session), session.debug.state.stream.state()
    dict.__setitem__(kept.state, "stream", kept.state["stream"] | {"fingerprint": "other"})
    with pytest.raises(DataError, match="other prompts"):
        session.restore("a")
    assert checksums(session) == before
    assert session.debug.state.stream.state() == stood
    assert (session.step_count, session.weight_version) == (2, 2)


def test_a_damaged_snapshot_on_disk_changes_nothing(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session.step()
    kept = session.snapshot("a", on_disk=True)
    session.step()
    before = checksums(session)
    assert kept.folder
    file = next((kept.folder / "trainer").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"is damaged: .*has changed"):
        session.restore("a")
    assert checksums(session) == before
    assert session.step_count == 2
    session.forget("a")
    assert not kept.folder.exists()


def test_the_last_batch_is_there_also_where_its_update_was_refused(session: RLSession) -> None:
    from dataclasses import replace

    from kit.errors import StackError

    batch = session.advantages(session.score(session.generate()))
    bad = replace(batch, advantages=(float("nan"), *batch.advantages[1:]), token_advantages=None)
    with pytest.raises(StackError, match="refused"):
        session.update(bad)
    assert session.last_batch is bad
    session.update(batch)
    assert session.last_batch is batch


def test_a_closed_session_has_no_snapshots_and_says_so() -> None:
    with pytest.raises(SessionError, match="not started"):
        RLSession("tiny").snapshot()
    assert "No snapshots yet" in str(RLSession("tiny").snapshots())
