"""`kit runs`, and how runs are found by their names."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from kit.errors import RunError
from kit.reports.runs import RunInfo
from kit.runs.compare import compare_runs
from kit.runs.index import choose, find_runs, read_run, resolve, show_runs, sort_runs
from kit.runs.sweep.state import Member, SweepRecord
from kit.tracking.run_folder import find_run
from tests.runs.run_folders import make_run
from tests.runs.test_cli import kit


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs, a sweep of two, and things that are neither."""
    root = tmp_path_factory.mktemp("papermill_runs")
    make_run(root, 1, 1e-5)
    make_run(root, 2, 1e-4, steps=7, status="failed", error={"name": "E", "message": "boom"})
    make_run(root, 3, 1e-3, steps=0, status="interrupted")
    sweep = root / "20260131-150000-sweep-lesson-abcdef"
    inner = [make_run(sweep, 10 + i, 1e-4, seed=i, status=s) for i, s in enumerate(("completed",
             "interrupted"))]  # fmt: skip
    states = ("completed", "stopped")
    members = [
        Member(number=i, parameters={"seed": i}, state=state, folder=folder.name)
        for i, (folder, state) in enumerate(zip(inner, states, strict=True))
    ]
    members.append(Member(number=3, parameters={"seed": 2}))
    SweepRecord(notebook="lesson.ipynb", members=members).save(sweep)
    (root / "notes").mkdir()
    (root / "README").write_text("not a run")
    return root


def names(runs: list[RunInfo]) -> list[int]:
    return [int(run.name[-6:], 16) for run in runs]


def test_runs_and_members_of_sweeps_are_listed_the_newest_first(root: Path) -> None:
    found = find_runs(root)
    assert names(found) == [11, 10, 3, 2, 1]
    assert [run.sweep is not None for run in found] == [True, True, False, False, False]
    assert found[0].status == "stopped", "the sweep knows why it was interrupted"
    assert names(find_runs(root / "20260131-150000-sweep-lesson-abcdef")) == [11, 10]


def test_a_run_is_read_as_far_as_it_came(root: Path, tmp_path: Path) -> None:
    failed = next(run for run in find_runs(root) if run.status == "failed")
    assert (failed.steps, failed.error, failed.notebook) == (7, "E: boom", "lesson")
    killed = make_run(tmp_path, 1)
    (killed / "result.json").unlink()
    (killed / "params.yaml").write_text("{broken")
    alone = make_run(tmp_path, 2)
    for name in ("result.json", "params.yaml"):
        (alone / name).unlink()
    assert read_run(alone).status == "", "a session wrote it, outside of a run"
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 12, "rollout/raw')
    run = read_run(killed)
    assert (run.status, run.steps, run.parameters, run.seed) == ("unfinished", 12, {}, 0)
    (killed / "config.yaml").write_text("")
    assert read_run(killed).seed is None
    assert run.started is not None
    assert f"{run.started:%H:%M:%S}" == killed.name[9:15][:2] + ":26:01"


def test_conditions_choose_by_facts_and_parameters_and_numbers_are_numbers(root: Path) -> None:
    runs = find_runs(root)
    assert names(choose(runs, "status=completed")) == [10, 1]
    assert names(choose(runs, "lr=1e-4,status!=failed")) == [11, 10]
    assert names(choose(runs, "lr=0.0001, steps=7")) == [2]
    assert names(choose(runs, "sweep=none")) == [3, 2, 1]
    with pytest.raises(RunError, match="Did you mean 'status'"):
        choose(runs, "statu=x")
    with pytest.raises(RunError, match="NAME=VALUE"):
        choose(runs, "completed")


def test_runs_are_put_in_order_by_any_column_and_unknown_values_come_last(root: Path) -> None:
    runs = find_runs(root)
    assert names(sort_runs(runs, "lr"))[0] == 3
    assert names(sort_runs(runs, "-lr"))[0] == 1
    by_reward = sort_runs(runs, "reward")
    rewards = [run.reward_last for run in by_reward if run.reward_last is not None]
    assert rewards == sorted(rewards, reverse=True)
    assert names(by_reward)[-1] == 3
    assert sort_runs(runs, "status")[0].status == "completed"


def test_the_table_tells_what_differs_and_nothing_that_does_not(root: Path) -> None:
    output = io.StringIO()
    show_runs(find_runs(root), Console(file=output, width=200), "there")
    shown = output.getvalue()
    assert "lr=0.0001 seed=0 steps=7" in shown
    assert "note" not in shown.replace("notebook", "")
    assert "■ stopped" in shown
    assert "✗ failed" in shown
    assert "kit compare 00000b 000001 --in there" in shown
    assert "0.3 →" in shown or "0.267 → " in shown


def test_the_command_lists_as_a_table_and_as_json(root: Path) -> None:
    code, output = kit("runs", root, "--filter", "status=failed", "--json")
    assert code == 0
    (row,) = json.loads(output)
    assert (row["steps"], row["parameters"]["lr"], row["status"]) == (7, 1e-4, "failed")
    assert kit("runs", root)[1].count("\n") >= 6
    assert "No runs in" in kit("runs", root / "notes")[1]
    code, output = kit("runs", root / "nothing")
    assert code == 2
    assert "There is no folder" in output
    assert kit("runs", root, "--sort", "reword")[0] == 2


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        (["000002"], [2]),
        (["20260131-142601"], [1]),
        (["last"], [10, 11]),
        (["last~1"], [3]),
        (["last~3", "last~2"], [2, 3]),
        (["00000b"], [11]),
        (["abcdef"], [10, 11]),
        (["00000b", "abcdef"], [11, 10]),
    ],
)
def test_a_run_is_found_by_beginning_signs_at_its_end_or_age(
    root: Path, asked: list[str], found: list[int]
) -> None:
    assert names(resolve(asked, root)) == found


def test_a_folder_is_a_name_too_and_a_member_keeps_its_sweep(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = next((root / "20260131-150000-sweep-lesson-abcdef").glob("*-00000b"))
    monkeypatch.chdir(inner)
    for name in (inner, "."):
        (run,) = resolve([name], "elsewhere")
        assert (run.status, run.sweep) == ("stopped", "20260131-150000-sweep-lesson-abcdef")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("2026", r"6 runs have a name that begins with '2026'(.|\n)*write more"),
        ("20260131-142801-lesson-000004", "Did you mean '20260131-142801-lesson-000003'"),
        ("last~9", "holds 4"),
    ],
)
def test_a_name_that_means_none_or_several_is_refused_with_those_there_are(
    root: Path, name: str, message: str
) -> None:
    with pytest.raises(RunError, match=message):
        resolve([name], root)


def test_where_one_run_is_meant_the_last_is_one_and_a_sweep_is_refused_with_its_members(
    root: Path,
) -> None:
    assert find_run("last", root) == resolve(["last~1"], root)[0].folder
    assert find_run("00000b", root) == resolve(["00000b"], root)[0].folder
    with pytest.raises(RunError, match=r"is a sweep(.|\n)*00000a, .*00000b"):
        find_run("abcdef", root)


def test_a_folder_that_is_no_run_is_refused(root: Path) -> None:
    with pytest.raises(RunError, match="neither a run nor a sweep"):
        resolve([root / "notes"], root)
    with pytest.raises(RunError, match="`kit run` makes one"):
        resolve(["x"], root / "notes")


def test_last_beside_another_name_counts_runs_those_of_a_sweep_too(root: Path) -> None:
    """After a sweep, `kit compare last last~1` compares its last two members."""
    assert names(resolve(["last", "last~1"], root)) == [11, 10]
    assert names(resolve(["last~2", "last"], root)) == [3, 11]
    assert set(names(resolve(["last"], root))) == {10, 11}
    with pytest.raises(RunError, match="last~9"):
        resolve(["last", "last~9"], root)


def test_forks_of_a_runs_session_stand_behind_it_and_have_names_of_their_own(
    tmp_path: Path,
) -> None:
    for number in (1, 2):
        run = make_run(tmp_path, number)
        for fork in ("a", "b"):
            made = make_run(tmp_path / "made", number, 1e-3, steps=4, sampled=False)
            (made / "result.json").unlink()
            (made / "params.yaml").unlink()
            (run / "forks").mkdir(exist_ok=True)
            made.rename(run / "forks" / fork)
    (tmp_path / "made").rmdir()
    found = find_runs(tmp_path)
    assert [run.name.partition("/")[2] for run in found] == ["", "forks/a", "forks/b"] * 2
    assert [run.steps for run in found] == [12, 4, 4] * 2
    assert found[1].fork_of == found[0].name
    assert (found[1].status, found[1].started) == (found[0].status, found[0].started)
    output = io.StringIO()
    show_runs(found, Console(file=output, width=200), "there")
    text = output.getvalue()
    assert "000002/forks/a" in text
    assert "4 of them forks" in text
    (one,) = resolve(["000001/forks/b"], tmp_path)
    assert one == found[5]
    with pytest.raises(RunError, match="has no fork 'c'"):
        resolve(["last/forks/c"], tmp_path)
    compared = compare_runs(["last", "last/forks/a", "last/forks/b"], root=tmp_path)
    assert len(compared.groups) == 3
    assert "fork" in {d.name for d in compared.differences}
