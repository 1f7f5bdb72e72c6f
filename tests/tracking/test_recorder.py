from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest

from kit.config import SessionConfig
from kit.reports import EvalReport
from kit.reports.runs import known_headline
from kit.runs import result
from kit.samples import Rollout, Sample
from kit.tracking import run_folder
from kit.tracking.recorder import RUN_DIR_VARIABLE, Recorder, current_run, is_mark


def evaluation(
    right: float, step: int, dataset: str = "tiny:addition", graded: float = 0.0
) -> EvalReport:
    """Twenty responses, so many of which are right; the reward of the others is `graded`."""
    rewards = [1.0] * round(20 * right) + [graded] * round(20 * (1 - right))
    rollout = Rollout([Sample(reward=reward) for reward in rewards])
    return EvalReport(
        dataset=dataset,
        mean_reward=rollout.mean_reward(),
        prompts=4,
        n_samples_per_prompt=1,
        temperature=0.0,
        pass_at_k={1: right},
        rollout=rollout,
        step=step,
        seconds=0.5,
    )


def test_outside_of_a_run_there_is_no_recorder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIR_VARIABLE, raising=False)
    assert current_run() is None


def test_inside_of_a_run_the_recorder_writes_to_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(RUN_DIR_VARIABLE, str(tmp_path))
    recorder = current_run()
    assert recorder is not None
    assert recorder.folder == tmp_path


def test_the_recorded_settings_load_back_equal(tmp_path: Path) -> None:
    config = SessionConfig.preset("tiny").replace("seed", 7)
    Recorder(tmp_path).start(config)
    assert SessionConfig.load(tmp_path / "config.yaml") == config
    assert result.seed(tmp_path) == 7


def test_a_second_session_does_not_overwrite_the_settings_of_the_first(tmp_path: Path) -> None:
    first, second = SessionConfig.preset("tiny"), SessionConfig.preset("tiny-chain")
    Recorder(tmp_path).start(first)
    Recorder(tmp_path).start(second)
    assert SessionConfig.load(tmp_path / "config.yaml") == first
    assert SessionConfig.load(tmp_path / "config-2.yaml") == second


def test_steps_are_lines_of_json_in_order_with_null_for_what_is_not_finite(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "made" / "when needed")
    recorder.step({"rollout/raw_reward": 0.5, "train/loss": math.nan}, 1)
    recorder.step({"rollout/raw_reward": 0.75, "train/grad_norm": math.inf}, 2)
    lines = (recorder.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "rollout/raw_reward": 0.5, "train/loss": None},
        {"step": 2, "rollout/raw_reward": 0.75, "train/grad_norm": None},
    ]


def test_numbers_of_other_libraries_are_recorded_as_numbers(tmp_path: Path) -> None:
    import numpy as np

    Recorder(tmp_path).step({"a": np.float32(0.5), "b": np.int64(3)}, np.int64(1))  # type: ignore[arg-type,dict-item]
    assert run_folder.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 0.5, "b": 3}]


def test_a_file_that_cannot_be_written_warns_once_and_never_raises(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    recorder = Recorder(tmp_path)
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl cannot be written"):
        recorder.step({"a": 1.0}, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        recorder.step({"a": 1.0}, 2)


def test_a_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    Recorder(tmp_path).step({"rollout/raw_reward": 0.5}, 1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rollout/raw')
    assert run_folder.reward_curve(tmp_path) == [(1, 0.5)]


def test_the_headline_compares_the_first_dataset_before_and_after(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.evaluation(evaluation(0.5, step=0))
    for step, reward in enumerate([0.4, 0.6, 0.9], start=1):
        speed = {"perf/tokens_per_gpu_per_sec": 100.0 * step}
        recorder.step({"rollout/raw_reward": reward} | speed, step)
    recorder.evaluation(evaluation(0.7, step=2))
    recorder.evaluation(evaluation(0.1, step=3, dataset="other"))
    recorder.evaluation(evaluation(0.95, step=3))
    assert result.headline(tmp_path) == {
        "steps": 3,
        "reward_first": 0.4,
        "reward_last": 0.9,
        "tokens_per_second": 200.0,
        "dataset": "tiny:addition",
        "mean_reward_before": 0.5,
        "mean_reward_after": 0.95,
        "accuracy_before": 0.5,
        "accuracy_after": 0.95,
    }


def test_a_mean_of_graded_rewards_is_not_called_accuracy(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.evaluation(evaluation(0.25, step=0, graded=0.4))
    recorder.evaluation(evaluation(0.5, step=3, graded=0.4))
    rows = run_folder.read_rows(tmp_path / "evaluations.jsonl")
    assert [row["mean_reward"] for row in rows] == pytest.approx([0.55, 0.7])
    assert [row["accuracy"] for row in rows] == [None, None]
    headline = result.headline(tmp_path)
    ends = [headline[f"mean_reward_{when}"] for when in ("before", "after")]
    assert ends == pytest.approx([0.55, 0.7])
    assert (headline["accuracy_before"], headline["accuracy_after"]) == (None, None)


def test_what_version_0_1_called_accuracy_is_read_as_a_mean_reward(tmp_path: Path) -> None:
    row = {"dataset": "a", "step": 2, "accuracy": 0.9065}
    (tmp_path / "evaluations.jsonl").write_text(json.dumps(row) + "\n")
    headline = result.headline(tmp_path)
    assert (headline["mean_reward_after"], headline["accuracy_after"]) == (0.9065, None)
    assert known_headline({"steps": 3, "accuracy_after": 0.9}) == {
        "steps": 3,
        "mean_reward_after": 0.9,
    }


def test_an_evaluation_keeps_its_numbers_without_its_responses(tmp_path: Path) -> None:
    Recorder(tmp_path).evaluation(evaluation(0.25, step=4))
    (row,) = run_folder.read_rows(tmp_path / "evaluations.jsonl")
    assert row["pass_at_k"] == {"1": 0.25}
    assert row["temperature"] == 0.0
    assert "rollout" not in row


def test_a_run_that_measured_nothing_has_an_empty_headline(tmp_path: Path) -> None:
    numbers = result.headline(tmp_path)
    assert numbers.pop("steps") == 0
    assert set(numbers.values()) == {None}
    assert result.draw_reward_curve(tmp_path) is None
    assert result.text_curve(tmp_path) == ""


def test_checkpoints_belong_into_the_run(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    assert recorder.checkpoint_dir() == tmp_path / "checkpoints" / "final"
    assert recorder.checkpoint_dir(20) == tmp_path / "checkpoints" / "step-000020"


def test_a_mark_from_a_file_names_files_of_a_run_only(tmp_path: Path) -> None:
    mark = json.loads(json.dumps(Recorder(tmp_path).mark()))
    assert is_mark(mark)
    for wrong in (
        {"sizes": {"../../secret": 0}}, {"sizes": [1]}, {"sizes": {"metrics.jsonl": -1}},
        {"rows": [[1]]}, {"rows": [[1, "a"]]}, {"rows": None}, {"attempt": "1"}, {"base": True},
    ):  # fmt: skip
        assert not is_mark(mark | wrong), wrong
    assert not is_mark([1])
