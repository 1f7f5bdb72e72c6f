"""Runs on the real stack: the same seed again, and killed, and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
import yaml

from kit.cluster import registry
from kit.config import SessionConfig
from kit.reports.runs import RunRecord, read_record
from kit.runs.kernel import KERNEL_LOG
from kit.tracking.recorder import GROUP_VARIABLE
from tests.runs.conftest import write_notebook
from tests.runs.test_cli import kit

PARAMETERS = """\
steps: int = 6  # training steps
"""
STARTS = """\
import json, os, pathlib, signal
from kit import RLSession, SessionConfig

def trap(where, step):
    file = pathlib.Path("trap.json")
    if file.exists() and json.loads(file.read_text()) == [where, step]:
        file.unlink()
        os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

def reward(sample):
    session = RLSession.current()
    if session:
        trap("reward", session.step_count)
    return float(sample.response == sample.label)

config = SessionConfig.preset("tiny")
for name, value in {
    "rollout_batch_size": 4, "n_samples_per_prompt": 4, "global_batch_size": 16
}.items():
    config = config.replace(f"training.{name}", value)
config = config.replace("evaluation.interval", 3).replace("evaluation.max_prompts", 8)
session = RLSession.start(config, reward=reward)
session.evaluate()
first = session.generate()
"""
TRAINS = """\
after = lambda report: trap("after", report.step)
session.train(steps, until=after, show=False)
session.evaluate()
for number in session.steps(4):
    rollout = session.score(session.generate())
    session.update(session.advantages(rollout))
    session.sync()
    trap("after", number)
"""
ENDS = """\
session.save()
session.close()
"""
TIMES = ("perf/", "seconds")
"""All that two runs with the same seed differ in."""


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    lines = (folder / name).read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith(TIMES)}
        for line in lines
    ]


def without_times(folder: Path) -> bytes:
    lines = (json.dumps(row) + "\n" for row in rows(folder, "metrics.jsonl"))
    return "".join(lines).encode()


def files(folder: Path) -> set[str]:
    """Those of a run, without what Jupyter itself may complain of on a slow machine."""
    return {file.name for file in folder.iterdir()} - {KERNEL_LOG}


def call(notebooks: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """`kit run` in a process of its own; its stack stays warm for the next one."""
    return subprocess.run(
        [sys.executable, "-m", "kit", "run", *map(str, words), "--out", str(notebooks / "runs")],
        env=os.environ | {GROUP_VARIABLE: "resume"},
        capture_output=True,
        text=True,
        timeout=400,
    )


def begin(notebooks: Path, name: str = "trains.ipynb") -> Path:
    """A new run with the seed 3; its folder."""
    before = set(notebooks.glob("runs/*"))
    options = ["--seed", 3, "--checkpoint-every", 2, "--samples-every", 2]
    call(notebooks, notebooks / name, *options)
    (folder,) = set(notebooks.glob("runs/*")) - before
    return folder


@pytest.fixture(scope="module")
def notebooks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("notebooks")
    write_notebook(folder, STARTS, TRAINS, ENDS, parameters=PARAMETERS, name="trains.ipynb")
    yield folder
    for entry in registry.living():
        if entry.group == "resume":
            registry.terminate(entry)


@pytest.fixture(scope="module")
def whole(notebooks: Path) -> Path:
    """A run that nobody interrupted."""
    return begin(notebooks)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_metrics_to_the_byte_but_for_times(
    notebooks: Path, whole: Path
) -> None:
    again = begin(notebooks)
    assert read_record(whole).status == read_record(again).status == "completed"
    assert len(rows(whole, "metrics.jsonl")) == 10
    assert without_times(again) == without_times(whole)


def test_a_whole_run_leaves_a_folder_as_it_is_promised(whole: Path) -> None:
    assert files(whole) == {
        *("notebook.ipynb", "notebook.html", "params.yaml", "config.yaml", "result.json"),
        *("metrics.jsonl", "evaluations.jsonl", "samples.jsonl", "inputs.jsonl"),
        *("checkpoints", "figures"),
    }
    assert (whole / "figures" / "reward_curve.png").is_file()
    saved = {folder.name for folder in (whole / "checkpoints").iterdir()}
    assert saved == {f"step-{step:06d}" for step in (2, 4, 6, 8, 10)} | {"final"}
    assert {row["step"] for row in rows(whole, "samples.jsonl")} == {0, 2, 4, 6, 8}
    assert yaml.safe_load((whole / "params.yaml").read_text()) == {"steps": 6}
    assert SessionConfig.load(whole / "config.yaml").seed == 3
    record = read_record(whole)
    assert (record.seed, record.settings.seed, record.headline["steps"]) == (3, 3, 10)
    assert record.machine["cores"] > 0
    assert record.process is None


@pytest.mark.slow
def test_a_run_that_was_killed_again_and_again_ends_as_if_it_had_not_been(
    notebooks: Path, whole: Path
) -> None:
    trap = notebooks / "trap.json"
    trap.write_text('["reward", 1]')  # in a step, before there is a checkpoint
    folder = begin(notebooks)
    assert read_record(folder).status == "running"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "rollout/raw')  # a line that was being written

    trap.write_text('["after", 8]')  # in the second training, after a checkpoint
    resumed = call(notebooks, "--resume", folder)
    assert resumed.returncode == -signal.SIGKILL
    assert "begins again: step 0" in resumed.stdout
    assert [row["step"] for row in rows(folder, "metrics.jsonl")] == [*range(9)]

    resumed = call(notebooks, "--resume", folder.name)
    assert resumed.returncode == 0, resumed.stdout
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert rows(folder, name) == rows(whole, name)
    assert files(folder) == files(whole)
    record = read_record(folder)
    assert [attempt.status for attempt in record.lineage.attempts] == ["killed", "killed"]
    continued = [(one.attempt, one.training, one.step) for one in record.lineage.continued]
    assert continued == [(2, 1, 0), (2, 2, 6), (3, 1, 6), (3, 2, 8)]
    refused = call(notebooks, "--resume", folder)
    assert refused.returncode == 2
    assert "is completed" in refused.stderr


@pytest.mark.slow
def test_a_run_that_trains_adapters_is_resumed_to_the_same_end(notebooks: Path) -> None:
    starts = STARTS.replace('preset("tiny")', 'preset("tiny-lora")')
    trains = TRAINS.partition("for number")[0]
    write_notebook(notebooks, starts, trains, ENDS, parameters=PARAMETERS, name="adapters.ipynb")
    unbroken = begin(notebooks, "adapters.ipynb")
    assert SessionConfig.load(unbroken / "config.yaml").model.lora is not None
    (notebooks / "trap.json").write_text('["after", 3]')
    folder = begin(notebooks, "adapters.ipynb")
    assert read_record(folder).status == "running"
    resumed = call(notebooks, "--resume", folder)
    assert resumed.returncode == 0, resumed.stdout
    (continued,) = read_record(folder).lineage.continued
    assert continued.step > 0
    for name in ("metrics.jsonl", "evaluations.jsonl", "samples.jsonl"):
        assert rows(folder, name) == rows(unbroken, name)


@pytest.mark.slow
def test_a_run_that_is_still_running_is_not_resumed(tmp_path: Path) -> None:
    write_notebook(tmp_path, "import threading; threading.Event().wait()", name="waits.ipynb")
    words = [sys.executable, "-m", "kit", "run", str(tmp_path / "waits.ipynb")]
    command = [*words, "--out", str(tmp_path / "runs")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        shown = ""
        while "cell 2/2" not in shown and run.poll() is None:
            shown += run.stdout.readline()
        code, said = kit("run", "--resume", "last", "--out", tmp_path / "runs")
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=120)
    assert (code, run.returncode) == (2, 130)
    assert "is still running" in said
    (folder,) = (tmp_path / "runs").iterdir()
    record = read_record(folder)
    assert record.status == "interrupted"


def test_what_failed_is_run_again_with_the_notebook_and_the_values_that_it_had(
    tmp_path: Path,
) -> None:
    source = "import pathlib\nassert pathlib.Path('mended').exists()\nprint('steps', steps)"
    path = write_notebook(tmp_path, source)
    out = ("--out", tmp_path / "runs")
    assert kit("run", path, "-p", "steps", 7, *out)[0] == 1
    (tmp_path / "mended").touch()
    path.write_text("no notebook any more")
    code, said = kit("run", "--resume", "last", *out)
    assert code == 0, said
    (folder,) = (tmp_path / "runs").iterdir()
    cells = nbformat.read(folder / "notebook.ipynb", as_version=4).cells
    assert cells[-1].outputs[0].text == "steps 7\n"
    assert sum("injected-parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert not any("papermill-error-cell-tag" in c.metadata.get("tags", []) for c in cells)


def test_resuming_takes_nothing_that_would_make_it_another_run(tmp_path: Path) -> None:
    code, said = kit("run", "--resume", "last", "-p", "steps", 3)
    assert code == 2
    assert "goes on with a run as it was begun" in said
    code, said = kit("run", "lesson.ipynb", "--set", "training.learning_rate=1e-5")
    assert code == 2
    assert "--set goes with --resume" in said
    code, said = kit("run", "--resume", "last", "--set", "engine.replicas=2")
    assert code == 2
    assert "cannot change while the session runs" in said
    code, said = kit("run", "--resume", tmp_path)
    assert code == 2
    assert "neither a run nor a sweep" in said
    code, said = kit("run", "--resume", "nobody", "--out", tmp_path)
    assert code == 2
    assert "There is no run 'nobody'" in said


def test_a_record_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text('{"status": "done"}')
    code, said = kit("run", "--resume", tmp_path)
    assert code == 2
    assert "cannot be read as the record of a run" in said
    record = RunRecord(status="failed", notebook="a", directory="b", parameters={}, started="now")
    record.write(tmp_path)
    assert read_record(tmp_path) == record
