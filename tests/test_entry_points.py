"""`./build.sh`, `./train.sh` and `./test.sh` do what their help says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import nbformat
import psutil
import pytest

from kit.config import SessionConfig
from kit.config.presets import for_this_machine
from kit.tracking.recorder import GROUP_VARIABLE
from tests.tracking import read_back

ROOT = Path(__file__).parent.parent
SCRIPTS = ("build.sh", "train.sh", "test.sh")
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def call(script: str, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / script), *map(str, words)],
        capture_output=True,
        text=True,
        env=os.environ
        | {"KIT_PYTHON": sys.executable, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        | {"WANDB_MODE": "offline"}
        | environment,
        timeout=500,
    )


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    """A folder for PATH with the shell's own tools, and nothing else."""
    folder = tmp_path / "tools"
    folder.mkdir()
    for name in ("bash", "env", "cat", "dirname", "basename", "mkdir", "realpath", "ln"):
        (folder / name).symlink_to(shutil.which(name) or name)
    return folder


def finish_logging() -> None:
    """Wait for what a run has left to its logging process, on a machine that is busy otherwise."""
    processes = [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"]]
    logging = [p for p in processes if "kit.tracking.logger_process" in p.info["cmdline"]]
    psutil.wait_procs(logging, timeout=150)


def tool(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_explains_itself_and_refuses_what_it_does_not_know(script: str) -> None:
    helped = call(script, "--help")
    assert helped.returncode == 0
    assert f"Usage: ./{script}" in helped.stdout
    refused = call(script, "--fastre")
    assert refused.returncode == 2
    assert f"{script} knows no --fastre" in refused.stderr
    assert f"What to do: ./{script} --help" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none.yaml"], "There is no configuration file none.yaml"),
        (["tiny", "tiny-chain"], "Two configurations were given: tiny and tiny-chain"),
        (["-p", "steps"], "-p wants a name and a value"),
        (["--steps"], "--steps wants a value"),
    ],
)
def test_a_wrong_call_of_train_says_what_to_do(words: list[str], message: str) -> None:
    done = call("train.sh", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert "What to do:" in done.stderr


def test_without_environment_and_image_train_says_how_to_get_one(
    tools: Path, tmp_path: Path
) -> None:
    words = ("tiny", "--outputs", tmp_path / "out")
    done = call("train.sh", *words, KIT_PYTHON="/none", PATH=str(tools))
    assert done.returncode == 2
    assert "./build.sh makes one of them" in done.stderr
    tool(tools, "docker", 'echo "docker $*"')
    done = call("train.sh", *words, KIT_PYTHON="/none", PATH=str(tools))
    assert done.returncode == 0
    assert re.search(r"docker run --rm .*kit ./train.sh tiny", done.stdout)


def test_build_takes_docker_where_it_answers_and_make_elsewhere(tools: Path) -> None:
    tool(tools, "make", 'echo "make $*"')
    assert "make .venv/.kit" in call("build.sh", PATH=str(tools)).stdout
    refused = call("build.sh", "--docker", PATH=str(tools))
    assert (refused.returncode, "./build.sh --local" in refused.stderr) == (2, True)
    tool(tools, "docker", 'echo "docker $*"')
    assert "docker build --tag kit ." in call("build.sh", PATH=str(tools)).stdout
    assert "make .venv/.kit" in call("build.sh", "--local", PATH=str(tools)).stdout
    (tools / "make").unlink()
    assert "install the package make" in call("build.sh", "--local", PATH=str(tools)).stderr


@pytest.mark.slow
def test_train_trains_with_the_file_at_the_root_and_leaves_outputs_by_kind(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    done = call(
        "train.sh", "--steps", 2, "--outputs", outputs, **NO_GPU, **{GROUP_VARIABLE: "lessons"}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in outputs.iterdir()) == ["checkpoints", "logs", "wandb"]
    (run,) = (outputs / "logs").iterdir()
    assert json.loads((run / "result.json").read_text())["status"] == "completed"
    config = SessionConfig.load(run / "config.yaml")
    assert (config.model.name, config.training.num_rollout) == ("tiny", 2)
    assert config.training.rollout_size == 32 * 8
    rows = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1]
    finish_logging()
    history, *_ = read_back.wandb(outputs / "wandb" / run.name / "..")
    logged = [row["rollout/raw_reward"] for row in history if "rollout/step" in row]
    assert logged == [row["rollout/raw_reward"] for row in rows]
    assert list((outputs / "checkpoints" / run.name).rglob("*.safetensors"))
    cells = nbformat.read(run / "notebook.ipynb", as_version=4).cells
    shown = "".join(o.get("text", "") for c in cells for o in c.get("outputs", []))
    assert "There is no GPU here, so the tiny model learns to add" in shown
    assert re.search(r"addition: mean reward 0\.\d+ before, \d\.\d+ after", shown)


@pytest.mark.slow
def test_the_smoke_test_passes_here() -> None:
    done = call("test.sh", **NO_GPU, **{GROUP_VARIABLE: "lessons"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("✓") == 5
    assert "All well." in done.stdout


def test_a_dry_run_says_what_would_run_and_starts_nothing(tmp_path: Path) -> None:
    done = call("train.sh", "tiny", "--dry-run", "-p", "seed", 3, "--outputs", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "11_train_with_config.ipynb -p config tiny -p seed 3" in done.stdout
    assert list((tmp_path / "logs").iterdir()) == []


def test_the_file_at_the_root_is_for_a_gpu_and_gives_way_to_the_tiny_model_without_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = SessionConfig.load(ROOT / "config.yaml")
    assert config.model.name == "Qwen/Qwen3-0.6B"
    here, note = for_this_machine(config.replace("device", "cpu"))
    assert (here.model.name, note) == ("Qwen/Qwen3-0.6B", "")
    monkeypatch.setattr("kit.utils.hardware.gpu_count", lambda: 1)
    assert for_this_machine(config) == (config, "")
    monkeypatch.setattr("kit.utils.hardware.gpu_count", lambda: 0)
    here, note = for_this_machine(config)
    assert "no GPU here" in note
    assert here.data == SessionConfig.preset("tiny").data
    kept = {"learning_rate", "max_tokens_per_gpu"}
    assert here.training.model_dump(exclude=kept) == config.training.model_dump(exclude=kept)


def test_every_path_that_the_image_copies_is_there() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?:--\S+ )*(.+) \S+$", dockerfile, re.MULTILINE)
    assert copied
    for path in " ".join(copied).split():
        assert (ROOT / path).exists(), path
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"outputs", "logs", "papermill_runs"} <= set(ignored)


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="there is no shellcheck")
def test_the_scripts_are_clean() -> None:
    files = [ROOT / script for script in (*SCRIPTS, ".ci/run")]
    done = subprocess.run(["shellcheck", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_installed_kit_command_is_the_one_that_the_guide_calls() -> None:
    command = Path(sys.executable).with_name("kit")
    done = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in ("run", "compare", "doctor", "sweep", "export", "import"):
        assert re.search(rf"\b{name}\b", done.stdout), name
    (entry,) = entry_points(group="console_scripts", name="kit")
    assert callable(entry.load())
