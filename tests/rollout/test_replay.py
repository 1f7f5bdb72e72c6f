"""`session.replay`: rollouts of a run, in a session that lives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kit import RLSession
from kit.errors import DataError, RunError
from kit.reports.runs import RunRecord
from kit.samples import Sample
from kit.tracking.recorder import Recorder


def recorded(session: RLSession, folder: Path) -> list[Sample]:
    """A run's folder that holds two steps; the samples of the second."""
    recorder = Recorder(folder)
    recorder.start(session.config)
    for step in (0, 10):
        rollout = session.score(session.generate())
        recorder.step({"rollout/raw_reward": rollout.mean_reward()}, step, rollout)
    RunRecord(
        status="completed", notebook="x.ipynb", directory=".", parameters={}, started="now"
    ).write(folder)
    return list(rollout)


def test_a_recorded_rollout_can_be_scored_looked_at_and_trained_on_again(
    session: RLSession, tmp_path: Path
) -> None:
    then = recorded(session, tmp_path)
    rollout = session.replay(tmp_path, step=10)
    assert [(s.tokens, s.reward, s.rollout_log_probs) for s in rollout] == [
        (s.tokens, s.reward, s.rollout_log_probs) for s in then
    ]
    assert rollout.step == 10
    assert session.last_rollout is rollout
    assert session.replay(tmp_path).step == 10
    log_probs = session.log_probs(list(rollout))  # the weights are those that wrote it
    gaps = [
        abs(mine - its)
        for sample, row in zip(rollout, log_probs, strict=True)
        for mine, its in zip(row, sample.rollout_log_probs or [], strict=True)
    ]
    assert max(gaps) < 1e-3
    other = session.score(rollout, reward=lambda sample: float(sample.index % 2))
    assert other.rewards() != rollout.rewards()
    report = session.update(session.advantages(other))
    assert report.applied
    assert session.log_probs(list(rollout)) != log_probs


def test_what_was_not_kept_is_said_with_what_was(session: RLSession, tmp_path: Path) -> None:
    recorded(session, tmp_path)
    with pytest.raises(DataError, match=r"no samples of step 3.\n.*0, 10"):
        session.replay(tmp_path, step=3)
    (tmp_path / "samples.jsonl").unlink()
    with pytest.raises(DataError, match="has kept no samples"):
        session.replay(tmp_path)
    with pytest.raises(RunError, match="There is no run 'nowhere'"):
        session.replay("nowhere")


def test_broken_rows_are_refused_with_the_reason(session: RLSession, tmp_path: Path) -> None:
    recorded(session, tmp_path)
    file = tmp_path / "samples.jsonl"
    good = json.loads(file.read_text().splitlines()[0])
    for wrong in (
        {"tokens": "abc"}, {"tokens": [1e300]}, {"response": 3}, {"status": "odd"}, {"odd": 1},
        {"response_length": 10**6}, {"loss_mask": [1] * 500},
        {"version_lengths": [[]]}, {"token_values": {"a": [None]}}, {"prompt": [{}]},
    ):  # fmt: skip
        file.write_text(json.dumps(good | wrong) + "\n")
        with pytest.raises(DataError, match=r"samples of step 0 in .* cannot be read"):
            session.replay(tmp_path)
    for text, why in (
        ("[1]\n[2]", "it holds a list"),
        ("[" * 9000 + "\n1", "nested more"),
        ('{"step": -1}', "no number of a step"),
        ("\xff\n1", "not JSON"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=f"no samples that can be read.*\n.*{why}"):
            session.replay(tmp_path)
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(DataError, match="it is a device"):
        session.replay(tmp_path)


def test_a_rollout_of_another_tokenizer_is_refused(session: RLSession, tmp_path: Path) -> None:
    recorded(session, tmp_path)
    file = tmp_path / "samples.jsonl"
    rows = [json.loads(line) for line in file.open()]
    rows[0]["tokens"][0] = 150_000
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"another tokenizer.*\n.*token 150000"):
        session.replay(tmp_path, step=0)
    rows[0]["tokens"][0] = 1
    rows[0]["response"] = "something else"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="where 'something else' was written"):
        session.replay(tmp_path, step=0)


@pytest.mark.slow
def test_steps_that_are_undone_leave_the_metrics_of_a_run(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(session.debug.tracker, "recorder", recorder)
    session.train(2, show=False)
    session.snapshot("two")
    session.train(2, show=False)
    session.restore("two")

    def steps(name: str) -> list[int]:
        return [json.loads(line)["step"] for line in (tmp_path / name).open()]

    assert (steps("metrics.jsonl"), steps("undone.jsonl")) == ([0, 1], [2, 3])
    session.step()
    assert steps("metrics.jsonl") == [0, 1, 2]
