"""`python -m benchmarks.many_devices`: order and arithmetic of its table, and the whole command on
CPU cores.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks import many_devices
from benchmarks.device_parts import faults, table
from benchmarks.device_parts.children import Child
from benchmarks.device_parts.results import Results, RowResult
from benchmarks.device_parts.rows import WAYS, Row, device_sets, plan, waves
from benchmarks.device_parts.shapes import QWEN3_4B
from benchmarks.device_parts.table import same_digits, share, speed
from benchmarks.device_parts.task import Task
from kit.cluster import registry
from kit.cluster.placement import Layout
from kit.samples import Rollout

ONE, TWO, FOUR = (Row("4b", "colocated", n) for n in (1, 2, 4))


# ---- which rows, in which order ----------------------------------------------------------------


def test_the_most_telling_rows_come_first() -> None:
    rows = plan(["4b", "0.6b"], [1, 2, 4], WAYS, faults=True, sweep=True)
    colocated = ["4b 1", "4b 4", "4b 2", "0.6b 1", "0.6b 4", "0.6b 2"]
    assert [f"{row.shape} {row.devices}" for row in rows[:6]] == colocated
    assert {row.way for row in rows[:6]} == {"colocated"}
    others = [(row.shape, row.way, row.devices) for row in rows[6:14]]
    assert others[:4] == [
        ("4b", "tensor_parallel", 4),
        ("4b", "apart", 4),
        ("4b", "tensor_parallel", 2),
        ("4b", "apart", 2),
    ]
    assert {shape for shape, _, _ in others[4:]} == {"0.6b"}
    assert rows[14:] == [Row("0.6b", "faults", 4), Row("tiny", "sweep", 4)]


def test_ways_can_be_left_out_and_one_device_has_no_other_way() -> None:
    assert plan(["4b"], [1], WAYS) == [ONE]
    assert plan(["4b"], [1, 2], ["apart"]) == [Row("4b", "apart", 2)]
    assert plan(["4b"], [1], [], faults=True) == []
    assert plan(["4b"], [8], [], faults=True) == [Row("4b", "faults", 8)]


@pytest.mark.parametrize(
    ("way", "trainers", "engines"),
    [("colocated", 4, [1, 1, 1, 1]), ("tensor_parallel", 4, [2, 2]), ("apart", 2, [1, 1])],
)
def test_each_way_takes_all_its_devices(way: str, trainers: int, engines: list[int]) -> None:
    task = Task(Row("4b", way, 4), "cuda", "model", "folder", "batch", 0.0, 32)
    config = task.config()
    layout = Layout.of(config, "cuda", 8 << 30)
    assert layout.count == 4
    assert len(layout.trainers) == trainers
    assert [len(places) for places in layout.engines] == engines


def test_rows_that_fit_run_side_by_side_on_devices_of_their_own() -> None:
    rows = plan(["4b", "0.6b"], [1, 2, 4], WAYS, sweep=True)
    found = waves(rows, 4, side_by_side=True)
    assert found[0] == [ONE, TWO, Row("0.6b", "colocated", 1)]
    assert found[1] == [FOUR]
    assert found[-1] == [Row("tiny", "sweep", 4)]
    assert sorted(row.key for wave in found for row in wave) == sorted(row.key for row in rows)
    for wave in found:
        given = [name for devices in device_sets(wave, ["3", "5", "6", "7"]) for name in devices]
        assert len(given) == len(set(given)) == sum(row.devices for row in wave) <= 4


def test_without_side_by_side_rows_run_one_by_one_in_their_order() -> None:
    rows = plan(["4b"], [1, 2], WAYS)
    assert waves(rows, 8, side_by_side=False) == [[row] for row in rows]


def test_the_4b_shape_has_the_parameters_of_qwen3_4b() -> None:
    hidden, layers = QWEN3_4B["hidden_size"], QWEN3_4B["num_hidden_layers"]
    heads, head = QWEN3_4B["num_attention_heads"], QWEN3_4B["head_dim"]
    attention = 2 * hidden * head * (heads + QWEN3_4B["num_key_value_heads"])
    layer = attention + 3 * hidden * QWEN3_4B["intermediate_size"] + 2 * hidden + 2 * head
    assert layers * layer + (QWEN3_4B["vocab_size"] + 1) * hidden == 4_022_468_096


# ---- the table ---------------------------------------------------------------------------------


def step(seconds: float, tokens: int = 1000) -> dict[str, float]:
    return {
        "generation_s": seconds,
        "update_s": 2 * seconds,
        "sync_s": 0.1,
        "step_s": 4 * seconds,
        "new_tokens": tokens,
        "tokens": 3 * tokens,
    }


def measured(*seconds: float, gradient: float = 0.8859, tokens: int = 1000) -> dict[str, Any]:
    return {
        "steps": [step(each, tokens) for each in seconds],
        "first_update": {"train/grad_norm": gradient},
        "batch": "abc",
        "verified": {"parameters": 226, "compared": True},
        "mismatch": {"verdict": "pass", "mean_abs_diff": 0.0075},
    }


def results(*rows: RowResult) -> Results:
    work = {"weak": False, "shapes": {"4b": "A step."}}
    return Results({"devices": "4 x A Card", "versions": {"torch": "2"}}, ["cmd"], work, [*rows])


def test_times_and_rates_are_medians_over_the_steps() -> None:
    found = speed(measured(1.0, 4.0, 2.0), "update")
    assert found is not None
    assert (found.seconds, found.rate) == (4.0, 750.0)
    assert speed({}, "update") is None


@pytest.mark.parametrize(
    ("rate", "devices", "expected"), [(100.0, 1, 1.0), (300.0, 4, 0.75), (50.0, 2, 0.25)]
)
def test_a_share_is_of_n_times_one_device(rate: float, devices: int, expected: float) -> None:
    assert share(rate, 100.0, devices) == expected


def test_a_row_is_shown_beside_one_device() -> None:
    one, four = RowResult(ONE, "done", measured=measured(4.0)), RowResult(FOUR, "done")
    four.measured = measured(1.25)
    four.measured["steps"][0]["sync_s"] = 0.25
    cells = table.speeds(four, table.one_device(results(one, four), "4b"))
    assert cells[1:5] == ["4", "800", "1.25", "80%"]
    assert cells[-3:] == ["0.25", "2.5 x", "done, 1 step"]
    assert table.speeds(one, one)[4] == "100%"


def test_a_batch_that_grows_with_the_devices_counts_its_tokens() -> None:
    one = RowResult(ONE, "done", measured=measured(4.0))
    four = RowResult(FOUR, "done", measured=measured(4.0, tokens=4000))
    assert table.speeds(four, one)[4] == "100%"


def test_without_one_device_there_is_no_share() -> None:
    four = RowResult(FOUR, "done", measured=measured(1.0))
    assert table.one_device(results(four), "4b") is None
    assert table.speeds(four, None)[4] == table.NONE


@pytest.mark.parametrize(
    ("value", "same"),
    [(0.8859, True), (0.88595, True), (0.8860, True), (0.8861, False), (0.8849, False)],
)
def test_gradients_are_compared_in_four_digits(value: float, same: bool) -> None:
    assert same_digits(value, 0.8859) is same
    assert same_digits(1000 * value, 885.9) is same
    assert not same_digits(float("nan"), 0.8859)


def test_a_gradient_that_differs_is_told_and_other_samples_are_not_compared() -> None:
    one, four = (RowResult(row, "done", measured=measured(1.0)) for row in (ONE, FOUR))
    assert table.as_one(four, one) == "yes"
    assert table.wrong(results(one, four)) == []
    four.measured = measured(1.0, gradient=0.9)
    assert table.as_one(four, one) == "NO: 0.8859"
    assert "its first gradient is not that of one device" in table.wrong(results(one, four))[0]
    four.measured["batch"] = "def"
    assert table.as_one(four, one) == "other samples"


def test_what_does_not_hold_is_said() -> None:
    row = RowResult(Row("0.6b", "faults", 4), "done")
    row.measured = {
        "killed": {
            "error": "TrainerDiedError",
            "message": "It died.\nMore",
            "told_s": 1.0,
            "names_a_way_out": False,
            "ranks_left": 2,
        },
        "loaded": "2 trainers",
        "held_out": {"same": False, "mean": 1.0, "largest": 2.0},
        "weights": {"equal": 8, "of": 10},
    }
    swept = RowResult(Row("tiny", "sweep", 4), "failed", "exit code 1")
    swept.measured = {
        "sweep": {"members": 4, "completed": 3, "gpus": 3, "overlap_s": 0.0},
    }
    said = "\n".join(table.wrong(results(row, swept)))
    text = table.page(results(row, swept))
    for words in ("2 ranks were left", "a way out: It died.", "other log-probs", "2 weights"):
        assert words in said
    assert "3 of 4 completed" in said
    swept.measured["sweep"] = {"members": 4, "completed": 4, "gpus": 2, "overlap_s": 9.0}
    assert "4 members ran on 2 GPUs" in table.wrong(results(swept))[1]
    swept.measured["sweep"] = {"members": 4, "completed": 4, "gpus": 4, "overlap_s": 0.0}
    assert "one after the other" in table.wrong(results(swept))[1]
    swept.measured["sweep"] = {"members": 4, "completed": 4, "gpus": 4, "overlap_s": 9.0}
    assert len(table.wrong(results(swept))) == 1  # the row itself has failed
    assert all(f"**{line}**" in text for line in said.splitlines())
    assert "NOT THE SAME" in text


def test_a_page_tells_of_every_row_whatever_became_of_it() -> None:
    beside = RowResult(TWO, "done", beside=["4b-colocated-1"], measured=measured(2.0))
    failed = RowResult(FOUR, "failed", "StackError: no room", ["line 1", "the last line"])
    late = RowResult(Row("4b", "apart", 4), "not run", "3 s were left.")
    cut = RowResult(Row("4b", "apart", 2), "cut off", "Its time was over.", measured=measured(2.0))
    text = table.page(
        results(RowResult(ONE, "done", measured=measured(4.0)), beside, failed, late, cut)
    )
    assert "the last line" in text.split("4b-colocated-4: failed")[1]
    assert "3 s were left." in text
    assert "colocated: 2 trainers, 2 engines *" in text
    assert "beside 4b-colocated-1" in text
    assert "cut off, 1 step" in text
    rows = [line for line in text.splitlines() if line.startswith("| colocated")]
    assert {line.count("|") for line in rows} == {len(table.SPEEDS) + 1, len(table.LEARNING) + 1}


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    written = results(RowResult(ONE, "done", measured=measured(4.0)), RowResult(FOUR))
    written.write(tmp_path / "results.json")
    assert Results.read(tmp_path / "results.json") == written


def test_members_of_a_sweep_overlap_as_long_as_all_run() -> None:
    said = [{"device": str(n), "begin": n, "end": 10.0 + n} for n in range(4)]
    assert faults.together(said) == {"completed": 4, "gpus": 4, "overlap_s": 7.0}
    assert faults.together([])["overlap_s"] == 0.0


def test_differences_are_means_over_tokens() -> None:
    found = faults.difference([[0.0, 1.0], [2.0]], [[0.0, 1.5], [1.0]])
    assert found == {"mean": 0.5, "largest": 1.0}


# ---- the command -------------------------------------------------------------------------------


PATIENCE = ("--minutes", "60", "--row-minutes", "30")
"""No test bets on how fast a machine is."""


def command(folder: Path, *words: str) -> list[str]:
    given = ["--out", str(folder / "out"), "--work", str(folder / "work"), "--device", "cpu"]
    return [sys.executable, "-m", "benchmarks.many_devices", *given, *words]


def done(folder: Path) -> dict[str, RowResult]:
    return {each.row.key: each for each in Results.read(folder / "out/results.json").rows}


@pytest.mark.slow
def test_one_and_two_cpu_ranks_learn_the_same_in_one_table(tmp_path: Path) -> None:
    small = ("--counts", "1,2", "--steps", "1", "--prompts", "8", *PATIENCE)
    ran = subprocess.run(command(tmp_path, *small), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = done(tmp_path)
    states = {key: each.state for key, each in rows.items()}
    assert states.pop("tiny-tensor_parallel-2") == "not run"
    assert set(states) == {"tiny-colocated-1", "tiny-colocated-2", "tiny-apart-2"}
    assert set(states.values()) == {"done"}
    one = rows["tiny-colocated-1"]
    for key in states:
        assert rows[key].measured["verified"] == {"parameters": 34, "compared": True}
        assert len(rows[key].measured["steps"]) == 1
    assert table.as_one(rows["tiny-colocated-2"], one) == "yes"
    assert table.as_one(rows["tiny-apart-2"], one) == "yes"
    assert len(Rollout.load(tmp_path / "out/first-tiny.jsonl")) == 32
    assert "needs GPUs" in (tmp_path / "out/table.md").read_text()


@pytest.mark.slow
def test_a_killed_rank_is_told_and_a_sweep_runs_a_member_on_each_device(tmp_path: Path) -> None:
    words = ("--counts", "2", "--ways", "none", "--faults", "--sweep", "--steps", "1", *PATIENCE)
    ran = subprocess.run(command(tmp_path, *words), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    rows = done(tmp_path)
    found = rows["tiny-faults-2"].measured
    assert found["killed"]["error"] == "TrainerDiedError"
    assert found["weights"]["equal"] == found["weights"]["of"] > 0
    assert found["held_out"]["same"]
    assert found["went_on"]["finite"]
    assert rows["tiny-sweep-2"].measured["sweep"]["completed"] == 2


@pytest.mark.slow
def test_a_row_that_fails_shows_its_log_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(tmp_path, "--counts", "1,2", "--ways", "colocated", "--set", "training.lr=1")
    assert many_devices.main(words[3:]) == 1
    for each in done(tmp_path).values():
        assert each.state == "failed"
        assert "There is no setting 'training.lr'" in each.why
        assert "Traceback" in "\n".join(each.log)
    assert "training.lr" in capsys.readouterr().out


def test_a_row_without_time_is_not_begun(tmp_path: Path) -> None:
    words = command(tmp_path, "--counts", "1", "--minutes", "0.1")
    assert many_devices.main(words[3:]) == 0
    (row,) = done(tmp_path).values()
    assert (row.state, row.seconds) == ("not run", 0.0)
    assert "0 s were left" in row.why


def test_a_row_is_ended_when_its_time_is_over(tmp_path: Path) -> None:
    options = many_devices.parser().parse_args(command(tmp_path)[3:])
    options.shapes = ["tiny"]
    run = many_devices.Run(options, "cpu", ["0"], many_devices.begun(options, "cpu", ["0"]))
    task = a_task(tmp_path, deadline=0.0)
    run.results.of(task.row)
    child = Child.start(task, [], None)
    assert run.follow(task.row, child)
    child.end()
    assert run.results.of(task.row).state == "cut off"
    assert child.ended()


@pytest.mark.slow
def test_a_row_that_hangs_is_ended_with_its_whole_session(tmp_path: Path) -> None:
    before = {entry.stack for entry in registry.living()}
    child = Child.start(a_task(tmp_path, deadline=time.time() + 600), [], None)
    while not (child.news() or {}).get("steps"):
        assert not child.ended(), child.last_lines()
        time.sleep(0.2)
    assert {entry.stack for entry in registry.living()} > before
    os.kill(child.process.pid, signal.SIGSTOP)
    child.end()
    assert {entry.stack for entry in registry.living()} <= before


def a_task(folder: Path, deadline: float) -> Task:
    """One row on the CPU, which takes steps for ever."""
    return Task(
        row=Row("tiny", "colocated", 1),
        device="cpu",
        model="tiny",
        folder=str(folder / "row"),
        batch=str(folder / "first.jsonl"),
        deadline=deadline,
        prompts=4,
        makes_batch=True,
        steps=100_000,
        settings={"device": "cpu"},
    )


@pytest.mark.slow
def test_a_command_that_is_ended_leaves_no_process_and_its_first_numbers(tmp_path: Path) -> None:
    words = ("--counts", "1", "--steps", "100000", "--prompts", "4")
    before = {entry.stack for entry in registry.living()}
    running = subprocess.Popen(command(tmp_path, *words), stdout=subprocess.DEVNULL)
    while not (tmp_path / "out/results.json").exists() or not (
        done(tmp_path)["tiny-colocated-1"].measured.get("steps")
    ):
        assert running.poll() is None
        time.sleep(0.2)
    (worker,) = psutil.Process(running.pid).children()
    os.kill(running.pid, signal.SIGTERM)
    assert running.wait(90) == 143
    assert not worker.is_running()
    assert {entry.stack for entry in registry.living()} <= before
    (row,) = done(tmp_path).values()
    assert row.measured["steps"]


def test_a_run_that_goes_on_keeps_rows_of_the_same_workload_only(tmp_path: Path) -> None:
    options = many_devices.parser().parse_args(command(tmp_path, "--missing")[3:])
    options.shapes = ["tiny"]
    first = many_devices.begun(options, "cpu", ["0"])
    first.of(Row("tiny", "colocated", 1)).state = "done"
    options.out.mkdir()
    first.write(options.out / "results.json")
    batch = options.out / "first-tiny.jsonl"
    batch.write_text("")
    assert many_devices.begun(options, "cpu", ["0"]).rows[0].state == "done"
    assert batch.exists()
    options.weak = True
    assert many_devices.begun(options, "cpu", ["0"]).rows == []
    assert not batch.exists()
    assert json.loads((options.out / "results.json").read_text())["workload"]["weak"] is False
