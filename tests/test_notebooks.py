"""The lessons run from top to bottom on the real stack, with the tiny model, as batch runs.

Their exercises are filled in with the published solutions, so that one run shows both.
"""

from __future__ import annotations

import json
import re
from typing import Any

import nbformat
import pytest

from kit.config import SessionConfig
from kit.runs import RunResult
from tests.lessons import exercise_cells, run, texts


def lesson(name: str) -> Any:
    """A fixture: the lesson as it ran, once for this file."""

    @pytest.fixture(scope="module")
    def ran(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
        return run(name, tmp_path_factory.mktemp("runs"))

    return ran


one_step = lesson("01_one_step")
training = lesson("02_train_to_solve")
mismatches = lesson("03_why_log_probs_differ")
rewards = lesson("04_samples_and_rewards")
estimators = lesson("05_estimators")
patients = lesson("06_reading_a_run")


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


def test_the_flawed_reward_is_gamed_and_the_mended_one_is_not(rewards: RunResult) -> None:
    steps = re.findall(r"step +(\d+) +reward ([\d.]+) +really right ([\d.]+)", texts(rewards))
    second = [index for index, (step, *_) in enumerate(steps) if step == "0"][1]
    gamed, mended = (
        [(float(reward), float(right)) for _, reward, right in part]
        for part in (steps[:second], steps[second:])
    )
    assert gamed[-1][0] > 2 * gamed[0][0]
    assert gamed[-1][1] < max(right for _, right in gamed) - 0.2
    assert mended[-1][1] > mended[0][1] + 0.2
    evaluations = [json.loads(row) for row in (rewards.folder / "evaluations.jsonl").open()]
    _, hacked, solved = (row["accuracy"] for row in evaluations)
    assert solved > 0.75
    assert hacked < solved - 0.2


def test_each_patient_is_sick_in_the_way_that_the_lesson_says(patients: RunResult) -> None:
    def rows(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (patients.folder / name / "metrics.jsonl").open()]

    def last(name: str, metric: str) -> float:
        return sum(row[metric] for row in rows(name)[-3:]) / 3

    reward, truncated = "rollout/raw_reward", "rollout/truncated_ratio"
    assert last("healthy", reward) > rows("healthy")[0][reward] + 0.2
    assert last("healthy", truncated) < 0.05
    assert last("too hot", reward) < 0.5 * rows("healthy")[0][reward]
    assert abs(last("too cold", "train/entropy_loss") - 0.7) < 0.15
    assert last("held back", reward) < last("healthy", reward) - 0.15
    assert last("cut short", truncated) > 0.5
    assert sorted(path.name for path in (patients.folder / "too hot").iterdir()) == [
        "config.yaml",
        "evaluations.jsonl",
        "metrics.jsonl",
    ]


ALL = ["one_step", "training", "mismatches", "rewards", "estimators", "patients"]


@pytest.mark.parametrize("name", ALL)
def test_the_solutions_pass_the_checks_of_their_lesson(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: RunResult = request.getfixturevalue(name)
    cells = exercise_cells(nbformat.read(result.notebook, as_version=4))
    verdicts = [cell.outputs[-1]["data"]["text/plain"] for cell in cells.values()]
    assert verdicts == [f"Exercise {number}: ✓ right." for number in cells]
    assert len(cells) == 3


@pytest.mark.parametrize("name", ALL)
def test_the_pages_of_the_lessons_need_no_network(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: RunResult = request.getfixturevalue(name)
    html = (result.folder / "notebook.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=\s*[\"']?(http|//)", html)
