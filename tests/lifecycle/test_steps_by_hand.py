"""A step that is made verb by verb is a step: in the history, in a run's files, after an undo."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, Rollout
from kit.checkpoint import checkpoint
from kit.samples import Batch
from kit.tracking.recorder import Recorder
from kit.tracking.run_folder import read_rows

WHOLE = {"perf/step_time", "perf/update_weights_time"}
"""What a step has and its verbs have not."""


@pytest.fixture
def run(session: RLSession, tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that the session belongs to."""
    tracker, folder = session.debug.tracker, tmp_path / "run"
    tracker.recorder = Recorder(folder)
    yield folder
    tracker.recorder = None


def by_hand(session: RLSession) -> Batch:
    batch = session.advantages(session.score(session.generate()))
    session.update(batch)
    session.sync()
    return batch


def without_times(rows: list[Any]) -> list[dict[str, float]]:
    return [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in rows]


@pytest.mark.slow
def test_steps_by_hand_leave_the_rows_that_whole_steps_leave(session: RLSession, run: Path) -> None:
    session.step()
    for _ in range(2):
        by_hand(session)
    session.step()
    mine, written = list(session.history), read_rows(run / "metrics.jsonl")
    kept = [row for row in read_rows(run / "samples.jsonl")]
    session.restore("first")
    for _ in range(4):
        session.step()
    whole = session.history
    assert [row["step"] for row in mine] == [row["step"] for row in written] == [0, 1, 2, 3]
    assert without_times(mine) == without_times(written) == without_times(whole)
    times = [{name for name in row if name.startswith("perf/")} for row in (*whole, *mine)]
    assert [times[0] - here for here in times[4:]] == [set(), WHOLE, WHOLE, set()]
    assert mine[1]["perf/tokens_per_gpu_per_sec"] > 0
    assert {row["step"] for row in kept} == {0}  # of every ten the first


def test_an_undo_takes_steps_by_hand_back_and_an_update_counts_once(
    session: RLSession, run: Path
) -> None:
    batch = by_hand(session)
    assert not session.update(batch).applied
    session.snapshot("one")
    by_hand(session)
    session.restore("one")
    assert [row["step"] for row in session.history] == [0]
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [0]
    assert [row["step"] for row in read_rows(run / "undone.jsonl")] == [1]
    session.forget("one")


def test_half_a_rollout_is_a_step_of_its_own_samples(session: RLSession) -> None:
    rollout = session.score(session.generate())
    halves = [Rollout(rollout.samples[:64], rollout.step), Rollout(rollout.samples[64:])]
    for half in halves:
        session.update(session.advantages(half))
    assert [row["step"] for row in session.history] == [0, 1]
    rewards = [row["rollout/raw_reward"] for row in session.history]
    assert rewards == [half.mean_reward() for half in halves]
    assert "perf/tokens_per_gpu_per_sec" not in session.history[1]


@pytest.mark.slow
def test_what_is_due_after_a_step_is_done_after_its_sync(
    session: RLSession, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    changes = {"evaluation.interval": 2, "evaluation.max_prompts": 4, "checkpoint.interval": 2}
    for name, value in changes.items():
        session.debug.state.config = session.config.replace(name, value)
    for _ in range(3):
        by_hand(session)
    session.sync()
    assert [row["step"] for row in read_rows(run / "evaluations.jsonl")] == [2]
    evaluated = [any(name.startswith("eval/") for name in row) for row in session.history]
    assert evaluated == [False, True, False]
    (saved,) = (run / "checkpoints").iterdir()
    assert checkpoint.read(saved)[1]["step_count"] == 2
    by_hand(session)
    session.restore(saved)
    assert [row["step"] for row in session.history] == [0, 1]


def test_a_trial_that_is_kept_is_a_step(session: RLSession, run: Path) -> None:
    session.snapshot("before")
    by_hand(session)
    session.keep(session.what_if(lr=5e-4), 1)
    assert [row["step"] for row in session.history] == [0]
    (row,) = read_rows(run / "metrics.jsonl")
    assert (row["step"], row["train/lr"]) == (0, 5e-4)
    session.forget("before")


def test_a_loop_by_hand_is_counted_by_its_updates(session: RLSession) -> None:
    session.step()
    seen = []
    for number in session.steps(3):
        seen.append(number)
        if len(seen) != 2:  # an iteration that leaves its rollout alone
            by_hand(session)
    assert seen == [1, 2, 2, 3]
    assert [row["step"] for row in session.history] == [0, 1, 2, 3]
