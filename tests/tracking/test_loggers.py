"""Metrics reach the real libraries under Miles' names, and nothing that they do stops a run."""

from __future__ import annotations

import json
import os
import signal
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from kit import RLSession, SessionConfig
from kit.reports import EvalReport, UpdateReport
from kit.samples import Rollout
from kit.tracking import Loggers, start
from kit.tracking import loggers as logger_outlet
from tests.tracking import read_back

ALL = {
    "use_tensorboard": True,
    "use_wandb": True,
    "wandb_mode": "offline",
    "wandb_project": "sums",
    "wandb_group": "first",
    "use_trackio": True,
}


@pytest.fixture(autouse=True)
def _neither_the_users_places_nor_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        logger_outlet, "CLOSE_SECONDS", 300.0
    )  # for a machine that does other things too
    for name in ("TRACKIO_DIR", "WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def update(step: int, losses: tuple[float, ...] = (0.5, 0.25)) -> UpdateReport:
    per_step = tuple({"train/loss": loss} for loss in losses)
    return UpdateReport(step, dict(*per_step[:1]), per_step, 8, 64, 1.0)


def evaluation(step: int, n: int = 1) -> EvalReport:
    shares = {1: 0.5, 2: 0.75} if n > 1 else {1: 0.5}
    return EvalReport("sums", 0.5, 4, n, 0.0, shares, Rollout([]), step, 0.1)


def told(loggers: Loggers) -> Iterator[str]:
    """Wait until the process that logs has said what went wrong, and give the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while loggers.open_sinks and not loggers.ended.wait(0.01):
            loggers.step({}, update(0), 0)
        loggers.step({}, update(0), 0)
        loggers.close()
    return ours(caught)


def ours(caught: Iterable[warnings.WarningMessage]) -> Iterator[str]:
    """What the loggers said, without what Python says of files that nobody closed."""
    messages = (str(warning.message) for warning in caught)
    return (message for message in messages if message.startswith("Logging to"))


def test_a_session_logs_to_three_libraries_what_its_own_history_says(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SessionConfig(**session.config.model_dump() | {"logging": ALL})
    loggers = start(config, tmp_path)
    monkeypatch.setattr(session.debug.tracker, "loggers", loggers)
    session.train(2, show=False)
    accuracy = session.evaluate().mean_reward
    assert loggers is not None
    loggers.close()
    rewards = [row["rollout/raw_reward"] for row in session.history]
    losses = [row["train/loss"] for row in session.history]

    scalars, texts = read_back.tensorboard(tmp_path / "tensorboard")
    assert dict(scalars["rollout/raw_reward"]) == pytest.approx(dict(enumerate(rewards)))
    assert dict(scalars["train/loss"]) == pytest.approx(dict(enumerate(losses)), abs=1e-7)
    assert dict(scalars["eval/addition"]) == pytest.approx({2: accuracy})
    assert "rollout_batch_size: 16" in texts["config"]
    assert str(tmp_path) in texts["folder"]

    history, logged_config, steps, run = read_back.wandb(tmp_path)
    assert [r["rollout/raw_reward"] for r in history if "rollout/step" in r] == rewards
    assert [r["train/loss"] for r in history if "train/step" in r] == losses
    assert [(r["eval/step"], r["eval/addition"]) for r in history if "eval/step" in r] == [
        (2, accuracy)
    ]
    assert steps["train/*"] == "train/step"
    assert steps["perf/*"] == steps["rollout/*"] == "rollout/step"
    assert steps["eval/*"] == "eval/step"
    assert (run.project, run.run_group, run.display_name) == ("sums", "first", tmp_path.name)
    assert logged_config["training"]["rollout_batch_size"] == 16
    assert logged_config["run_folder"] == str(tmp_path)

    kept, logged_config = read_back.trackio(tmp_path, "sums")
    assert [r["rollout/raw_reward"] for r in kept if "rollout/step" in r] == rewards
    assert logged_config["run_folder"] == str(tmp_path)


def test_each_kind_of_metric_is_counted_by_miles_step_key() -> None:
    config = SessionConfig(
        training={"rollout_batch_size": 4, "n_samples_per_prompt": 4, "global_batch_size": 8}
    )
    metrics = {"rollout/raw_reward": 0.5, "perf/step_time": 2.0, "train/loss": 1.0, "eval/x": 1.0}
    rollout, *trained = logger_outlet.of_step(config, metrics, update(3), 3)
    assert rollout == (
        "rollout/step",
        {"rollout/raw_reward": 0.5, "perf/step_time": 2.0, "rollout/step": 3.0},
    )
    assert trained == [
        ("train/step", {"train/loss": 0.5, "train/step": 6.0}),
        ("train/step", {"train/loss": 0.25, "train/step": 7.0}),
    ]
    (row,) = logger_outlet.of_evaluation(config, evaluation(3, n=2))
    assert row == (
        "eval/step",
        {"eval/sums": 0.5, "eval/step": 3.0, "eval/sums-pass@1": 0.5, "eval/sums-pass@2": 0.75},
    )
    by_update = config.replace("logging.wandb_always_use_train_step", True)
    assert [
        row["rollout/step"] for _, row in logger_outlet.of_step(by_update, {}, update(3, ()), 3)
    ] == [6]


def test_without_a_logger_nothing_starts_and_a_folder_of_its_own_is_made_where_there_is_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert start(SessionConfig(), tmp_path) is None
    disabled = {"use_wandb": True, "wandb_mode": "disabled"}
    assert start(SessionConfig(logging=disabled), tmp_path) is None
    monkeypatch.chdir(tmp_path)
    settings = {"use_tensorboard": True, "tb_project_name": "a", "tb_experiment_name": "b"}
    loggers = Loggers(SessionConfig(name="sums", logging=settings))
    loggers.step({"rollout/raw_reward": 1.0}, update(0), 0)
    loggers.close()
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.endswith("-sums")
    scalars, _ = read_back.tensorboard(folder / "tensorboard" / "a" / "b")
    assert scalars["rollout/raw_reward"] == [(0, 1.0)]


@pytest.mark.parametrize("sink", ["tensorboard", "wandb", "trackio"])
def test_a_library_that_is_not_there_is_told_once_with_the_way_to_get_it(
    sink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{sink}.py").write_text(f'raise ImportError("No module named {sink}")')
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), before]))
    loggers = Loggers(SessionConfig(logging={f"use_{sink}": True}), tmp_path / "run")
    (message,) = told(loggers)
    assert f"Logging to {sink} cannot be imported" in message
    assert f"pip install {sink}" in message
    assert f"logging.use_{sink}: false" in message


def test_a_folder_that_cannot_be_written_stops_one_logger_and_no_training(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorboard").write_text("a file, where a folder should be")
    config = SessionConfig(**session.config.model_dump() | {"logging": ALL})
    loggers = Loggers(config, tmp_path)
    monkeypatch.setattr(session.debug.tracker, "loggers", loggers)

    def train() -> None:
        assert len(session.train(2, show=False)) == session.step_count == 2
        loggers.close()

    with pytest.warns(RuntimeWarning, match=r"tensorboard failed \(.*logging\.dir") as caught:
        train()
    assert len([*ours(caught)]) == 1
    assert len(read_back.trackio(tmp_path, "sums")[0]) == 4
    assert len(read_back.wandb(tmp_path)[0]) == 4


def test_no_key_for_the_server_is_told_with_the_way_to_work_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    loggers = Loggers(SessionConfig(logging={"use_wandb": True}), tmp_path / "run")
    (message,) = told(loggers)
    assert "Logging to wandb failed" in message
    assert "wandb_mode: offline" in message


def test_a_library_that_hangs_holds_up_neither_steps_nor_the_other_loggers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trackio.py").write_text("import threading; threading.Event().wait()")
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), before]))
    settings = {"use_tensorboard": True, "use_trackio": True}
    loggers = Loggers(SessionConfig(logging=settings), tmp_path / "run")
    for step in range(500):
        loggers.step({"rollout/raw_reward": step / 500}, update(step), step)
    loggers.put(None)
    while loggers.open_sinks != {"trackio"}:
        loggers.ended.wait(0.01)
        loggers.warn_of_failures()
    monkeypatch.setattr(logger_outlet, "CLOSE_SECONDS", 0.1)
    with pytest.warns(RuntimeWarning, match="trackio has not taken everything") as caught:
        loggers.close()
    assert len([*ours(caught)]) == 1
    scalars, _ = read_back.tensorboard(tmp_path / "run" / "tensorboard")
    assert scalars["rollout/raw_reward"][0] == (0, 0.0)
    loggers.process.kill()


def test_a_process_that_was_killed_is_told_once(tmp_path: Path) -> None:
    loggers = Loggers(SessionConfig(logging={"use_tensorboard": True}), tmp_path)
    os.kill(loggers.process.pid, signal.SIGKILL)
    (message,) = told(loggers)
    assert "its process is gone" in message


def test_the_process_ends_after_its_session_was_killed(tmp_path: Path) -> None:
    loggers = Loggers(SessionConfig(logging={"use_tensorboard": True}), tmp_path)
    logging = psutil.Process(loggers.process.pid)
    loggers.put(None)  # its input ends, as it does when this process is gone
    logging.wait(60)
    assert not logging.is_running()
    loggers.close()


def test_a_row_that_is_no_number_reaches_tensorboard_as_it_is(tmp_path: Path) -> None:
    loggers = Loggers(SessionConfig(logging={"use_tensorboard": True}), tmp_path)
    loggers.step({"rollout/raw_reward": float("nan")}, update(0, ()), 0)
    loggers.close()
    scalars, _ = read_back.tensorboard(tmp_path / "tensorboard")
    ((step, value),) = scalars["rollout/raw_reward"]
    assert step == 0
    assert json.dumps(value) == "NaN"


def test_what_cannot_be_started_is_told_and_raises_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logger_outlet.sys, "executable", str(tmp_path / "no python"))
    loggers = Loggers(SessionConfig(logging={"use_tensorboard": True}), tmp_path)
    with pytest.warns(RuntimeWarning, match="tensorboard failed"):
        loggers.step({}, update(0), 0)
    loggers.close()
