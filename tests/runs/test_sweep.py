"""Sweeps: many members, some of which fail, are killed or stopped, and none of which is lost.

The first sweep is on the real stack. The others are of notebooks that need none.
"""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from kit.cluster import registry
from kit.errors import RunError
from kit.runs.sweep.display import SweepDisplay
from kit.runs.sweep.run import exclusive, resume_sweep, run_sweep
from kit.runs.sweep.state import Member, State, SweepRecord, read_sweep
from kit.tracking.run_folder import read_rows
from tests.cases import slow
from tests.runs.conftest import MakeNotebook
from tests.runs.sweep_notebook import training_notebook
from tests.runs.test_cli import kit

SEEDED = """\
reward: float = 0.5
seed: int = 0
"""
RECORDS = """\
import threading
from kit.runs import current_run

for step in range(4):
    current_run().step({"rollout/raw_reward": reward}, step)
if reward < 0.3:
    threading.Event().wait()
"""
"""Trains well and ends, or badly and never ends by itself."""
WAITS = """\
import os, pathlib, threading
pathlib.Path(f"ready-{seed}").write_text(str(os.getpid()))
if not pathlib.Path("go").exists():
    threading.Event().wait()
"""
"""Never ends, unless there is a file named `go`."""


LRS = ["1e-4"]
"""Learning rates of the sweep on the real stack."""
FAILS = (float(LRS[0]), "rloo", 1)
IS_KILLED = (1e-4, "grpo", 0)
MEMBERS = 4 * len(LRS)


def quiet() -> Console:
    return Console(file=io.StringIO(), width=120)


@pytest.fixture(scope="module", autouse=True)
def _two_cores() -> Iterator[None]:
    """For two members at a time, whatever this test run was told to keep to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KIT_CORES", "2")
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepRecord, SweepRecord]:
    """A sweep with 2 seeds, of which one member fails and one is killed; and resumed."""
    place = tmp_path_factory.mktemp("sweep")
    notebook, trouble = training_notebook(place), place / "trouble.json"
    trouble.write_text(json.dumps({"fails": FAILS, "is killed": IS_KILLED}))
    given = {
        "lr": ",".join(LRS),
        "advantage_estimator": "grpo,rloo",
        "trouble": str(trouble),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("KIT_RUN_DIR", raising=False)
        folder, before = run_sweep(
            notebook, given, seeds=2, parallel=2, out_root=place / "runs", console=quiet()
        )
        trouble.unlink()
        _, after = resume_sweep(folder, console=quiet())
    return folder, before, after


@pytest.mark.slow
def test_one_member_that_fails_and_one_that_is_killed_do_not_stop_the_others(
    trained: tuple[Path, SweepRecord, SweepRecord],
) -> None:
    _, before, _ = trained
    keys = ("lr", "advantage_estimator", "seed")
    states = {tuple(m.parameters[k] for k in keys): m.state for m in before.members}
    assert len(states) == MEMBERS
    assert states.pop(FAILS) == "failed"
    assert states.pop(IS_KILLED) == "killed"
    assert set(states.values()) == {"completed"}
    assert before.status == "failed"
    assert "ValueError: boom" in next(m.why for m in before.members if m.state == "failed")
    assert "SIGKILL" in next(m.why for m in before.members if m.state == "killed")


@pytest.mark.slow
def test_a_resumed_sweep_runs_only_what_was_not_completed_and_ends_complete(
    trained: tuple[Path, SweepRecord, SweepRecord],
) -> None:
    folder, before, after = trained
    assert after.status == "completed"
    assert {m.state for m in after.members} == {"completed"}
    again = [m.number for m in after.members if m.attempts == 2]
    assert again == [m.number for m in before.members if m.state != "completed"]
    kept = {m.number: m.folder for m in before.members if m.state == "completed"}
    assert {n: after.members[n - 1].folder for n in kept} == kept
    failed, killed = (next(m for m in before.members if m.state == s) for s in ("failed", "killed"))
    assert [f.name for f in (folder / "attempts").iterdir()] == [failed.folder], "it began again"
    assert after.members[killed.number - 1].folder == killed.folder, "its run went on"


@pytest.mark.slow
def test_every_member_has_a_complete_folder_of_its_own(
    trained: tuple[Path, SweepRecord, SweepRecord],
) -> None:
    folder, _, after = trained
    assert after == read_sweep(folder)
    assert len({member.folder for member in after.members}) == MEMBERS
    for member in after.members:
        run = folder / str(member.folder)
        files = {file.name for file in run.iterdir()}
        assert {"notebook.ipynb", "notebook.html", "params.yaml", "config.yaml"} <= files
        assert {"metrics.jsonl", "samples.jsonl", "evaluations.jsonl"} <= files
        result = json.loads((run / "result.json").read_text())
        assert result["status"] == "completed"
        given = {k: v for k, v in member.parameters.items() if k != "trouble"}
        assert result["parameters"].items() >= given.items()
        rows = read_rows(run / "metrics.jsonl")
        assert len(rows) == member.steps == 2
        assert member.reward_last == rows[-1]["rollout/raw_reward"]
    expected = {"sweep.json", "logs", "attempts", "comparison.html"}
    assert {f.name for f in folder.iterdir()} == expected | {m.folder for m in after.members}


@pytest.mark.slow
def test_seeds_are_a_band_and_estimators_are_curves(
    trained: tuple[Path, SweepRecord, SweepRecord],
) -> None:
    folder, *_ = trained
    code, shown = kit("compare", folder)
    assert code == 0, shown
    assert f"{MEMBERS} runs of two_steps in {MEMBERS // 2} curves" in shown
    assert "advantage_estimator rloo" in shown
    assert "0, 1" in shown
    listed = kit("runs", folder.parent)[1]
    assert f"{MEMBERS} runs in" in listed
    assert f"{MEMBERS} of them members of sweeps" in listed


@pytest.mark.slow
def test_members_follow_each_other_on_a_warm_stack_and_none_is_left(
    trained: tuple[Path, SweepRecord, SweepRecord],
) -> None:
    folder, before, _ = trained
    logs = [(folder / "logs" / f"{m.number:02}.log").read_text() for m in before.members]
    assert all("kit run" in log.splitlines()[0] for log in logs)
    assert [entry for entry in registry.living() if entry.group] == []


@pytest.mark.slow
def test_members_below_the_bound_or_the_median_are_ended_in_order_and_recorded_as_stopped(
    make_notebook: MakeNotebook, tmp_path: Path
) -> None:
    folder, record = run_sweep(
        make_notebook(RECORDS, parameters=SEEDED),
        {"reward": "0.5,0.6,0.7,0.2,0.1"},
        parallel=2,
        stop_below="0.15@2",
        stop_median=2,
        out_root=tmp_path / "runs",
        console=quiet(),
    )
    assert [m.state for m in record.members] == ["completed"] * 3 + ["stopped"] * 2
    # Two run at a time, so the third may be at its last step when this one is judged.
    assert re.search(r"below 0\.\d+, the median of [23] others", record.members[3].why)
    assert record.members[4].why == "reward 0.100 at step 2, below 0.15"
    run = folder / str(record.members[4].folder)
    assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
    assert (run / "notebook.ipynb").is_file()
    assert record.status == "completed"
    _, again = resume_sweep(folder, console=quiet())
    assert [m.attempts for m in again.members] == [1] * 5, "a stopped member has had its say"


@contextmanager
def sweeping(make: MakeNotebook, place: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A sweep of four members that never end, of which two run; and the sweep's folder."""
    notebook = make(WAITS, parameters=SEEDED)
    words = ["sweep", str(notebook), "--seeds", "4", "--parallel", "2", "--out", str(place / "r")]
    with subprocess.Popen(
        [sys.executable, "-m", "kit", *words],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "KIT_CORES": "2", "CUDA_VISIBLE_DEVICES": ""},
    ) as process:
        until(lambda: all((place / f"ready-{seed}").exists() for seed in (0, 1)), process)
        (folder,) = (place / "r").iterdir()
        try:
            yield process, folder
        finally:
            process.kill()


def until(done: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 200
    while not done() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("number", slow(signal.SIGINT, signal.SIGKILL))
def test_a_sweep_that_is_ended_leaves_no_process_and_can_be_resumed(
    make_notebook: MakeNotebook, tmp_path: Path, number: signal.Signals
) -> None:
    with sweeping(make_notebook, tmp_path) as (process, folder):
        started = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(number)
        process.communicate(timeout=200)
    assert len(started) >= 4
    _, left = psutil.wait_procs(started, timeout=120)
    assert left == []
    record = read_sweep(folder)
    if number is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert [m.state for m in record.members] == ["running"] * 2 + ["waiting"] * 2
    else:
        assert process.returncode == 130
        assert [m.state for m in record.members] == ["interrupted"] * 2 + ["waiting"] * 2
        assert record.status == "interrupted"
    for member in record.members[:2]:
        result = json.loads((folder / str(member.folder) / "result.json").read_text())
        assert result["status"] == "interrupted"
    if number is signal.SIGINT:
        return
    (tmp_path / "go").touch()
    code, shown = kit("sweep", "--resume", folder)
    assert code == 0, shown
    assert "4 completed" in shown
    assert [m.attempts for m in read_sweep(folder).members] == [2, 2, 1, 1]


def test_a_terminal_shows_every_member_with_state_step_and_reward(tmp_path: Path) -> None:
    states: list[State] = ["completed", "failed", "stopped", "running", "waiting"]
    members = [Member(number=i, parameters={"lr": i / 10, "steps": 30}, state=state)
               for i, state in enumerate(states, start=1)]  # fmt: skip
    for member in members[:-1]:
        member.attempts, member.steps, member.seconds = 1, 12, 83.0
        member.reward_first, member.reward_last = 0.25, 0.75
    members[1].why = "Cell 3 failed: [bold]ValueError[/bold]"
    members[3].parameters, members[3].folder = {"lr": 0.4}, "now"
    (tmp_path / "now").mkdir()
    (tmp_path / "now" / "config.yaml").touch()  # its session is about to write it
    record = SweepRecord(notebook="a.ipynb", grid={"lr": [0.1]}, members=members)
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140, height=40)
    with SweepDisplay(console, tmp_path, record, ["GPU 0"]) as display:
        display.show()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert "1 member to run, 1 at a time, GPU 0 each" in shown
    assert re.search(r"1 +0.1 +✓ completed +12/30 +0.25 → 0.75 +1 min 23 s", shown)
    assert re.search(r"2 +0.2 +✗ failed.*\[bold\]ValueError\[/bold\]", shown)
    assert re.search(r"4 +0.4 +▶ running +12 +0.25", shown)
    assert re.search(r"5 +0.5 +○ waiting", shown)


def test_a_sweep_that_runs_cannot_be_resumed_meanwhile(
    make_notebook: MakeNotebook, tmp_path: Path
) -> None:
    SweepRecord(notebook=str(make_notebook("1")), members=[]).save(tmp_path)
    with exclusive(tmp_path), pytest.raises(RunError, match="is running"):
        resume_sweep(tmp_path, console=quiet())


@pytest.mark.slow
def test_the_command_says_what_it_does_and_exits_with_1_where_a_member_failed(
    make_notebook: MakeNotebook, tmp_path: Path
) -> None:
    path = make_notebook("assert seed == 0, 'only that one'", parameters=SEEDED)
    code, shown = kit(
        "sweep", path, "--seeds", "0,5", "-p", "reward", "1,2", "--out", tmp_path / "r"
    )
    assert code == 1
    assert "[2/4] reward=1.0 seed=5: failed after" in shown
    assert "AssertionError: only that one" in shown
    assert "2 completed, 2 failed" in shown
    assert "kit sweep --resume" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "reward", "high"], "takes float"),
        (["-p", "rewar", "1,2"], "Did you mean 'reward'"),
        (["--seeds", "a"], "--seeds is 'a'"),
        (["--parallel", "999"], "or less"),
        (["--stop-below", "3"], "REWARD@STEP"),
        (["--resume", "x"], "goes on with a sweep"),
    ],
)
def test_a_wrong_call_exits_with_2_before_there_is_a_folder(
    make_notebook: MakeNotebook, tmp_path: Path, words: list[str], message: str
) -> None:
    path = make_notebook("1", parameters=SEEDED)
    code, shown = kit("sweep", path, *words, "--out", tmp_path / "r")
    assert code == 2
    assert message in shown
    assert not (tmp_path / "r").exists()


def test_a_folder_that_is_no_sweep_cannot_be_resumed(tmp_path: Path) -> None:
    code, shown = kit("sweep", "--resume", tmp_path)
    assert code == 2
    assert "has no sweep.json" in shown
    (tmp_path / "sweep.json").write_text('{"members": 3}')
    assert "cannot be read" in kit("sweep", "--resume", tmp_path)[1]
