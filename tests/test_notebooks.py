"""The notebooks run from top to bottom on the real stack, with the tiny model, as batch runs.

The exercises of lessons are filled in with the published solutions, so that one run shows both.
"""

from __future__ import annotations

import ast
import builtins
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
import pytest

from kit.config import SessionConfig
from kit.reports import TrainReport
from kit.runs import RunResult
from kit.tiny import tasks
from tests.cases import slow
from tests.lessons import (
    FAST,
    LESSONS,
    NOTEBOOKS,
    exercise_cells,
    notebook_times,
    run,
    run_quietly,
    solutions,
    texts,
)


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
patients = lesson("06_reading_runs")
trials = lesson("07_what_if")
zero = lesson("08_exactly_zero")
adapters = lesson("09_lora")
drafts = lesson("13_speculative")
bits = lesson("14_low_precision")


def word_problems(file: Path, split: str, count: int) -> str:
    """Sums in the form of GSM8K's rows."""
    rows = [
        {"question": row["prompt"], "answer": f"It is {row['label']}.\n#### {row['label']}"}
        for row in tasks.rows("addition", split)[:count]
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def real_thing(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """The run for a GPU, with a model and numbers for a laptop."""
    folder = tmp_path_factory.mktemp("runs")
    small = {
        "model": "tiny",
        "data": word_problems(folder / "train.jsonl", "train", 200),
        "eval_data": word_problems(folder / "test.jsonl", "held_out", 100),
        "system_prompt": "",
        "device": "auto",
        "steps": 3,
        "prompts": 8,
        "samples": 4,
        "response_tokens": 8,
        "eval_every": 2,
        "eval_prompts": 40,
        "learning_rate": 1e-4,
    }
    return run_quietly(NOTEBOOKS / "10_qwen3_gsm8k.ipynb", small, folder)


@pytest.mark.slow
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


@pytest.mark.slow
def test_one_batch_goes_through_every_estimator_and_a_contender_trains(
    estimators: RunResult,
) -> None:
    cells = nbformat.read(estimators.notebook, as_version=4).cells
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 4
    assert "reinforce_plus_plus" in texts(estimators)
    assert re.search(r"rloo +\d+\.\d% -> \d+\.\d%", texts(estimators))


@pytest.mark.slow
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
    assert numbers["steps"] == 20
    assert numbers["reward_last"] > numbers["reward_first"]
    assert numbers["accuracy_after"] > numbers["accuracy_before"]


def test_a_training_run_leaves_settings_metrics_picture_and_checkpoint(
    training: RunResult,
) -> None:
    config = SessionConfig.load(training.folder / "config.yaml")
    assert (config.seed, config.training.num_rollout) == (1, 20)
    rows = (training.folder / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == sorted(
        json.loads(row)["step"] for row in rows
    )
    assert (training.folder / "figures" / "reward_curve.png").stat().st_size > 1000
    assert list((training.folder / "checkpoints" / "final").rglob("*.safetensors"))


@pytest.mark.slow
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


@pytest.mark.slow
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
        "samples.jsonl",
    ]


@pytest.mark.slow
def test_the_patients_stand_side_by_side_with_what_was_done_to_each(patients: RunResult) -> None:
    shown = texts(patients)
    assert "5 runs side by side" in shown
    table = shown.split("5 runs side by side")[1]
    assert re.search(r"training\.learning_rate +0\.0001 +0\.003 +1e-07 +0\.0001 +0\.0001", table)
    assert re.search(r"training\.kl_loss_coef .* 5\.0 ", table)
    assert re.search(r"rollout\.max_response_len .* 8$", table, re.MULTILINE)


@pytest.mark.slow
def test_what_is_undone_comes_back_and_one_of_the_trials_stays(trials: RunResult) -> None:
    shown = texts(trials)
    assert "as before: True" in shown
    assert shown.count("the same responses: True") == 1
    assert "the same accuracy afterwards: True" in shown
    assert "step 4, weights version 5" in shown
    assert "as after the step: True" in shown
    rate = re.search(r"learning rate from now on: ([\d.e-]+)", shown)
    assert rate
    assert 1e-6 < float(rate[1]) < 1e-3
    evaluations = [json.loads(row) for row in (trials.folder / "evaluations.jsonl").open()]
    assert evaluations[-1]["accuracy"] > evaluations[0]["accuracy"]
    assert (trials.folder / "checkpoints" / "final" / "manifest.json").is_file()
    assert list((trials.folder / "model").glob("*.safetensors"))


@pytest.mark.slow
def test_both_sides_are_equal_to_the_bit_and_an_exchanged_expert_is_seen(zero: RunResult) -> None:
    shown = texts(zero)
    assert shown.count("✓ exact") == 2
    plain = [float(gap) for gap in re.findall(r"(?m)^\d +(\S+) +0\.0$", shown)]
    assert len(plain) == 6
    assert all(gap > 0 for gap in plain)  # and that of true_on_policy, beside it, is 0
    assert re.search(r"\(\d+, 3, 2\) tokens, layers, experts of a token", shown)
    (first,) = re.findall(r"(?m)^0 +(\de-\d+) +(\de-\d+)$", shown)
    assert float(first[1]) > 1000 * float(first[0])
    (gaps,) = re.findall(r"(?m)^mean \|difference\| +(\S+) +(\S+)$", shown)
    assert float(gaps[1]) < float(gaps[0]) / 2  # with replay
    assert len(re.findall(r"engine.* 42\.0% -> \d+\.\d%", shown)) == 3


@pytest.mark.slow
def test_adapters_learn_and_two_students_of_one_base_come_to_do_opposite_things(
    adapters: RunResult,
) -> None:
    shown = texts(adapters)
    assert "as without an adapter: True" in shown
    for rank in (1, 8):
        (after,) = re.findall(rf"rank {rank} +42\.0% -> (\d+\.\d)%", shown)
        assert float(after) > 60
    slow_rate, fast_rate = (
        [float(value) for value in re.search(rf"(?m)^learning rate {rate}(.*)$", shown)[1].split()]  # type: ignore[index]
        for rate in ("1e-05", "0.001")
    )
    assert slow_rate[-1] > 0.8 > 0.4 > fast_rate[0] > fast_rate[-1]
    rows = re.findall(r"(?m)^(base|careful|hasty) +(\d+) +(\d+)% +(\d+)%$", shown)
    steps, right, short = ({who: int(row[n]) for who, *row in rows} for n in range(3))
    assert steps == {"base": 0, "careful": 6, "hasty": 6}
    assert right["careful"] > right["base"] > right["hasty"]
    assert short["careful"] < short["base"] < short["hasty"]
    (undone,) = re.findall(r"hasty one: (\d+)%, undone (\d+)%", shown)
    assert int(undone[0]) < int(undone[1])
    assert "the careful one as before: True" in shown
    (gap,) = re.findall(r"largest difference of a log-prob: (\S+)", shown)
    assert float(gap) < 1e-4
    assert (adapters.folder / "careful" / "adapter_model.safetensors").is_file()
    metrics = (adapters.folder / "forks" / "careful" / "metrics.jsonl").read_text()
    assert len(metrics.splitlines()) == 6


@pytest.mark.slow
def test_drafts_change_no_token_and_one_learns_along_while_the_other_is_frozen(
    drafts: RunResult,
) -> None:
    shown = texts(drafts)
    assert re.search(r"10 tokens, 10 passes", shown)
    assert "the same tokens: True" in shown
    assert "the same rewards in each step: True" in shown
    accepted = {
        who: [int(share) for share in re.findall(r"(\d+)%", row)]
        for who, row in re.findall(r"(?m)^(the draft|the policy) +(.*)$", shown)
    }
    # Without dice the policy is always right as a draft of its own.
    assert accepted["the policy"][0] == 100 > accepted["the draft"][0]
    assert accepted["the policy"][-1] < 100
    row = r"(?m)^{} +([\d.]+ -> [\d.]+) +[\d.]+ -> ([\d.]+)"
    along, frozen = (re.findall(row.format(way), shown) for way in ("learns along", "frozen"))
    assert along != frozen
    assert min(float(tokens) for _, tokens in along + frozen) > 1.5
    metrics = [json.loads(line) for line in (drafts.folder / "metrics.jsonl").open()]
    learned = ["train/draft_loss" in line for line in metrics]
    steps = FAST["13_speculative"]["steps"]
    assert learned[-2 * steps :] == [False] * steps + [True] * steps


@pytest.mark.slow
def test_few_bits_are_named_and_a_model_that_was_trained_through_them_is_better_with_them(
    bits: RunResult,
) -> None:
    shown = texts(bits)
    assert "253 numbers, the largest 448.0" in shown
    assert "engine.quantization asks" in shown
    assert re.search(r"as it is +\[.*\]  gradient \[0\.0,", shown)
    ways = ("engine alone", "engine alone, TIS", "both")
    apart = {way: re.findall(rf"(?m)^{way} +[\d.]+% +[\d.]+% +(\S+)$", shown) for way in ways}
    assert all(len(found) == 1 for found in apart.values()), apart
    assert float(apart["both"][0]) < 2e-3 < float(apart["engine alone"][0])
    served = r"(?m)^{} +\S+ +([\d.]+)% +([\d.]+)%$"
    (aware,) = re.findall(served.format(r"both \(QAT\)"), shown)
    assert float(aware[1]) > float(aware[0])


@pytest.mark.slow
def test_the_real_thing_trains_on_rows_like_those_of_gsm8k(real_thing: RunResult) -> None:
    config = SessionConfig.load(real_thing.folder / "config.yaml")
    assert (config.data.input_key, config.data.label_key) == ("question", "answer")
    assert (config.reward.name, config.rollout.max_response_len) == ("gsm8k", 8)
    assert config.training.rollout_size == 8 * 4
    metrics = [json.loads(row) for row in (real_thing.folder / "metrics.jsonl").open()]
    assert len(metrics) == 3
    assert all(0 < row["rollout/raw_reward"] < 1 for row in metrics)
    assert all(row["train/grad_norm"] > 0 for row in metrics)
    evaluations = [json.loads(row) for row in (real_thing.folder / "evaluations.jsonl").open()]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    assert all(row["accuracy"] > 0.3 for row in evaluations)
    assert list((real_thing.folder / "checkpoints" / "final").rglob("*.safetensors"))


@pytest.mark.slow
def test_the_real_thing_shows_its_checks_and_each_steps_difference_under_its_bound(
    real_thing: RunResult,
) -> None:
    shown = texts(real_thing)
    assert "can start here" in shown
    assert shown.count("Trainer against engine: ✓ pass") == 2
    assert re.search(r"largest of 3 steps: \d.*; above the bound of 1e-05: 0 steps", shown)
    assert len(re.findall(r"Sample \d+ of prompt \d+, token by token", shown)) == 2
    assert re.search(r"test: \d+\.\d% before, \d+\.\d% after", shown)
    cells = nbformat.read(real_thing.notebook, as_version=4).cells
    pictures = [o for c in cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) >= 2


@pytest.mark.slow
def test_a_model_data_and_rewards_of_ones_own_train_with_a_column_for_each_reward(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    result = run_quietly(NOTEBOOKS / "12_your_own.ipynb", {"steps": 2}, folder)
    config = SessionConfig.load(result.folder / "config.yaml")
    assert Path(config.model.name).name == "my-model"
    metrics = [json.loads(row) for row in (result.folder / "metrics.jsonl").open()]
    assert len(metrics) == 2
    for row in metrics:
        total = row["rollout/reward/right"] + 0.1 * row["rollout/reward/length"]
        assert row["rollout/raw_reward"] == pytest.approx(total)
        assert row["rollout/reward/number"] >= row["rollout/reward/right"]
    assert "reward/right" in texts(result)


class Anything(dict[str, Any]):
    """Names of a notebook that nobody has computed yet."""

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name):
            raise KeyError(name)
        return None


@pytest.mark.parametrize("name", LESSONS)
def test_exercises_that_are_not_filled_in_are_open_and_stop_no_run(name: str) -> None:
    cells = exercise_cells(nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4))
    known = Anything(healthy=TrainReport())
    for number, cell in cells.items():
        *before, verdict = ast.parse(cell.source).body
        exec(compile(ast.Module(before, []), number, "exec"), {}, known)
        assert isinstance(verdict, ast.Expr)
        shown = eval(compile(ast.Expression(verdict.value), number, "eval"), {}, known)
        assert str(shown).startswith(f"Exercise {number}: ○ not answered yet")


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_leaves_its_last_session_to_whoever_does_the_exercises(name: str) -> None:
    cells = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    code = [cell.source for cell in cells if cell.cell_type == "code"]
    first = next(i for i, source in enumerate(code) if "from kit.course import check" in source)
    assert not [source for source in code[first:] if ".close(" in source]
    starts = [i for i, source in enumerate(code) if "RLSession.start(" in source]
    ends = [i for i, source in enumerate(code) if ".close(" in source]
    assert max(starts) >= max(ends, default=0)
    assert "lives on" in cells[-1].source


SLOW = slow("one_step", "mismatches", "rewards", "estimators", "patients", "trials", "zero")
ALL = ["training", *SLOW]


@pytest.mark.parametrize("name", ALL)
def test_the_solutions_pass_the_checks_of_their_lesson(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: RunResult = request.getfixturevalue(name)
    cells = exercise_cells(nbformat.read(result.notebook, as_version=4))
    verdicts = [cell.outputs[-1]["data"]["text/plain"] for cell in cells.values()]
    assert verdicts == [f"Exercise {number}: ✓ right." for number in cells]
    assert len(cells) == 3


@pytest.mark.parametrize("name", [*ALL, *slow("real_thing")])
def test_the_pages_of_the_notebooks_need_no_network(
    name: str, request: pytest.FixtureRequest
) -> None:
    result: RunResult = request.getfixturevalue(name)
    html = (result.folder / "notebook.html").read_text()
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=\s*[\"']?(http|//)", html)


def test_every_notebook_runs_in_a_test_that_looks_at_its_results() -> None:
    """A new one has to be run by name through `kit run`, and its outcome looked at."""
    runs = re.compile(r"\b(lesson|run|run_quietly|run_notebooks?|call)\(")
    tests = [path.read_text() for path in Path(__file__).parent.rglob("test_*.py")]
    checking = [text for text in tests if runs.search(text) and "assert" in text]
    for path in NOTEBOOKS.glob("*.ipynb"):
        named = [text for text in checking if f'"{path.stem}' in text or f"{path.name}" in text]
        assert named, f"{path.name} runs in no test; see the fixtures of this file"


def test_every_lesson_has_solutions_for_all_its_exercises() -> None:
    for path in NOTEBOOKS.glob("*.ipynb"):
        exercises = exercise_cells(nbformat.read(path, as_version=4))
        if exercises:
            assert set(solutions(path.stem)) == set(exercises), path.name
    lessons = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    assert {path.stem for path in (NOTEBOOKS / "solutions").glob("*.md")} <= lessons


def test_the_times_of_notebooks_are_told_at_the_end_of_a_test_run() -> None:
    with tempfile.TemporaryDirectory() as place:  # not where the end of this run looks
        for name, seconds in (("01_one_step", 12.3), ("other", 5.0), ("07_what_if", 20.0)):
            folder = Path(place) / name
            folder.mkdir()
            result = {
                "notebook": f"/a/{name}.ipynb",
                "seconds": seconds,
                "status": "completed",
                "headline": {"steps": 3},
            }
            (folder / "result.json").write_text(json.dumps(result))
        assert notebook_times(Path(place)) == [
            "   12.3 s     3 steps  01_one_step",
            "   20.0 s     3 steps  07_what_if",
            "   32.3 s  in all",
        ]
        assert notebook_times(Path(place) / "other") == []
