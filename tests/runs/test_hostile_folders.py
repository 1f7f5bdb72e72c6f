"""A run's folder may hold anything: it is a row that says why, and the others stay."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from kit.errors import DataError, RunError
from kit.reports.runs import read_record
from kit.runs.compare import compare_runs
from kit.runs.index import find_runs, read_run, show_runs, sort_runs
from kit.samples import Rollout
from kit.tracking.run_files import RunFiles
from kit.viz.render import render
from tests.runs.run_folders import make_run


def line(folder: Path, name: str, text: str | bytes) -> None:
    data = text if isinstance(text, bytes) else text.encode()
    with (folder / name).open("ab") as file:
        file.write(data + b"\n")


def devices(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")


def pipe(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)


def result(folder: Path, **wrong: object) -> None:
    file = folder / "result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))


Harm = Callable[[Path], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "a list as a row": (lambda f: line(f, "metrics.jsonl", "[1, 2]"), "line 13: it holds a list"),
    "no step": (lambda f: line(f, "metrics.jsonl", '{"a": 1}'), "line 13: it has no step"),
    "a step of infinity": (
        lambda f: line(f, "metrics.jsonl", '{"step": 1e999}'), "no number of a step"),
    "other bytes": (
        lambda f: line(f, "metrics.jsonl", b'{"step": "\xff"}\n{"step": 12}'), "is no UTF-8 text"),
    "deep nesting": (
        lambda f: line(f, "metrics.jsonl", "[" * 90_000 + "\n{}"), "more than 100 levels"),
    "a long number": (
        lambda f: line(f, "metrics.jsonl", '{"step": 1, "a": ' + "9" * 5000 + "}\n{}"), "digits"),
    "metrics that are a device": (
        lambda f: devices(f, "metrics.jsonl"), "metrics.jsonl: it is a device, not a file"),
    "metrics that are a pipe": (
        lambda f: pipe(f, "metrics.jsonl"), "metrics.jsonl: it is a named pipe"),
    "a record that is a pipe": (lambda f: pipe(f, "result.json"), "result.json: it is a named"),
    "parameters that are deep": (
        lambda f: (f / "params.yaml").write_text("[" * 9000), "params.yaml: values are nested"),
    "an evaluation without a name": (
        lambda f: line(f, "evaluations.jsonl", '{"step": 3, "dataset": [1]}'), "its dataset is a"),
    "a headline of wrong types": (
        lambda f: result(f, headline={"steps": "many", "reward_first": [1]}), "result.json, steps"),
    "a headline that is a list": (lambda f: result(f, headline=[1]), "result.json, headline"),
    "times of wrong types": (
        lambda f: result(f, seconds="long", seed="x", status={}), "result.json, status"),
    "an error of wrong types": (lambda f: result(f, error="boom"), "result.json, error"),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMS)
def test_a_bad_run_folder_is_a_row_that_says_why_and_the_others_stay(
    tmp_path: Path, name: str
) -> None:
    harm, why = HARMS[name]
    good, other, bad = (make_run(tmp_path, i, lr) for i, lr in ((1, 1e-4), (2, 1e-3), (3, 1e-5)))
    harm(bad)
    found = find_runs(tmp_path)
    assert {run.folder for run in found} == {good, other, bad}
    assert why in " ".join(next(run.faults for run in found if run.folder == bad))
    assert not any(run.faults for run in found if run.folder != bad)
    console = Console(file=io.StringIO(), width=400)
    show_runs(sort_runs(found, "reward"), console, "here")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert why in printed
    assert bad.name in printed
    json.dumps([run.to_json() for run in found])
    compared = compare_runs([good, bad])
    assert any(why in note for note in compared.notes)
    assert why.split(":")[0] in render(compared)["text/plain"]


def test_settings_that_cannot_be_read_are_said_where_they_are_compared(tmp_path: Path) -> None:
    good, bad = make_run(tmp_path, 1), make_run(tmp_path, 2, 1e-3)
    devices(bad, "config.yaml")
    assert [run.folder for run in find_runs(tmp_path)] == [bad, good]
    notes = " ".join(compare_runs([good, bad]).notes)
    assert "config.yaml: it is a device, not a file" in notes


def test_a_sweep_that_cannot_be_read_is_a_row_that_says_why(tmp_path: Path) -> None:
    good, sweep = make_run(tmp_path, 1), tmp_path / "20260131-150000-sweep-lesson-abcdef"
    sweep.mkdir()
    for text, why in (("[" * 9000, "nested"), ('{"members": 1}', "validation"), ("\xff", "JSON")):
        (sweep / "sweep.json").write_text(text)
        rows = {run.folder: run for run in find_runs(tmp_path)}
        assert rows.keys() == {good, sweep}
        assert rows[sweep].status == "unreadable"
        assert why in rows[sweep].faults[0]


def test_a_sweep_names_no_folder_outside_of_its_own(tmp_path: Path) -> None:
    make_run(tmp_path / "elsewhere", 1)
    sweep = tmp_path / "sweep"
    sweep.mkdir()
    for folder in ("../elsewhere", str(tmp_path / "elsewhere"), ".."):
        member = {"number": 1, "parameters": {}, "folder": folder}
        (sweep / "sweep.json").write_text(json.dumps({"notebook": "a.ipynb", "members": [member]}))
        (row,) = (run for run in find_runs(tmp_path) if run.folder == sweep)
        assert row.status == "unreadable"


def test_half_a_last_line_is_no_fault_and_one_in_the_middle_is(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "a": NaN}\n{"step": 1, "a"')
    files = RunFiles(tmp_path)
    assert (files.metrics(), files.faults) == ([{"step": 0, "a": None}], [])
    line(tmp_path, "metrics.jsonl", '{"step": 2}')
    line(tmp_path, "metrics.jsonl", '{"step": 3}')
    assert [row["step"] for row in files.metrics()] == [0, 3]
    assert files.faults == ["metrics.jsonl, line 2: not JSON: Expecting ':' delimiter: line 1 "
                            "column 16 (char 15)"]  # fmt: skip


def test_names_and_values_reach_no_terminal_as_they_are(tmp_path: Path) -> None:
    make_run(tmp_path, 1, hostile="\x1b]0;owned\x07")
    bad = make_run(tmp_path, 2).rename(tmp_path / "20260131-142501-\x1b[31mred\u202e-00000f")
    line(bad, "metrics.jsonl", '{"step": "\\u001b[2J"}\n"\\ud800"')
    (bad / "params.yaml").write_text('"a\\e[1m": 1\nnote: "\\e[5m \\ud800"\n')
    console = Console(file=io.StringIO(), width=400)
    show_runs(find_runs(tmp_path), console, "here")
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b" not in printed
    assert "\x07" not in printed
    assert "\u202e" not in printed
    printed.encode()


@pytest.mark.parametrize(
    "row",
    ['[1]', '{"tokens": 5}', '{"tokens": ["a"]}', '{"status": []}', '{"status": "odd"}',
     '{"response": 5}', '{"prompt": [1]}', '{"reward": "1"}', '{"response_length": -3}',
     '{"token_values": [1]}', '{"loss_mask": [2], "tokens": [1], "response_length": 1}',
     '{"version_lengths": ["a"]}', "[" * 9000, '{"index": 1e999}', '{"\\ud800": 1}', "\xff"],
)  # fmt: skip
def test_a_sample_of_wrong_types_is_refused_with_its_line(tmp_path: Path, row: str) -> None:
    file = tmp_path / "rollout.jsonl"
    file.write_text(f"{row}\n", encoding="latin-1")
    with pytest.raises(DataError, match="line 1: not a sample"):
        Rollout.load(file)


def test_a_record_that_cannot_be_read_is_a_kit_error(tmp_path: Path) -> None:
    run = make_run(tmp_path, 1)
    for harm in (lambda: (run / "result.json").write_text("[" * 9000),
                 lambda: devices(run, "result.json")):  # fmt: skip
        harm()
        with pytest.raises(RunError, match="cannot be read"):
            read_record(run)
        assert read_run(run).status == "unreadable"
