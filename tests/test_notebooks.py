"""The lessons run from top to bottom on the real stack, with the tiny model, as batch runs."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import nbformat
import pytest
from rich.console import Console

from kit.config import SessionConfig
from kit.runs import RunResult, run_notebook
from tests.lessons import FAST, NOTEBOOKS


def run(folder: Path, name: str) -> RunResult:
    path = NOTEBOOKS / name
    quiet = Console(file=io.StringIO())
    result = run_notebook(path, FAST.get(path.stem, {}), out_root=folder, console=quiet)
    assert result.error is None, result.error.traceback
    return result


@pytest.fixture(scope="module")
def one_step(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("runs"), "01_one_step.ipynb")


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("runs"), "02_train_to_solve.ipynb")


@pytest.fixture(scope="module")
def mismatches(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("runs"), "03_why_log_probs_differ.ipynb")


@pytest.fixture(scope="module")
def estimators(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return run(tmp_path_factory.mktemp("runs"), "05_estimators.ipynb")


def texts(result: RunResult) -> str:
    """Everything that the cells show, as plain text."""
    cells = nbformat.read(result.notebook, as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("data", {}).get("text/plain", "") or o.get("text", "") for o in outputs)


def test_five_causes_made_on_purpose_are_found(mismatches: RunResult) -> None:
    table = texts(mismatches).split("what was done")[1]
    rows = {line[:40].strip(): line for line in table.splitlines()}
    for what, cause in [
        ("no sync", "stale_weights"),
        ("temperature", "temperature"),
        ("text and back", "tokenization"),
        ("no template", "chat_template"),
        ("coarse engine", "precision"),
    ]:
        (line,) = [line for line in rows.values() if what in line and "fail" in line]
        assert cause in line
    assert "7 of 7 invariants hold" in texts(mismatches)


def test_one_batch_goes_through_every_estimator_and_a_contender_trains(
    estimators: RunResult,
) -> None:
    cells = nbformat.read(estimators.notebook, as_version=4).cells
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    assert "reinforce_plus_plus" in texts(estimators)
    assert re.search(r"rloo +\d+\.\d% -> \d+\.\d%", texts(estimators))


def test_every_verb_of_one_step_shows_its_result(one_step: RunResult) -> None:
    cells = nbformat.read(one_step.notebook, as_version=4).cells
    silent = [
        cell.source
        for cell in cells
        if cell.cell_type == "code"
        and "parameters" not in ",".join(cell.metadata.get("tags", []))
        and cell.source != "session.close()"
        and not cell.outputs
    ]
    assert silent == []


def test_training_raises_reward_and_held_out_accuracy(training: RunResult) -> None:
    numbers = training.headline
    assert numbers["steps"] == 30
    assert numbers["reward_last"] > numbers["reward_first"]
    assert numbers["accuracy_after"] > numbers["accuracy_before"]


def test_a_training_run_leaves_settings_metrics_picture_and_checkpoint(
    training: RunResult,
) -> None:
    config = SessionConfig.load(training.folder / "config.yaml")
    assert (config.seed, config.training.num_rollout) == (1, 30)
    rows = (training.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == sorted(
        json.loads(row)["step"] for row in rows
    )
    assert (training.folder / "reward_curve.png").stat().st_size > 1000
    assert list((training.folder / "checkpoint").rglob("*.safetensors"))


@pytest.mark.parametrize("name", ["one_step", "training", "mismatches", "estimators"])
def test_the_pages_of_the_lessons_need_no_network(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: RunResult = request.getfixturevalue(name)
    html = (result.folder / "notebook.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=\s*[\"']?(http|//)", html)
