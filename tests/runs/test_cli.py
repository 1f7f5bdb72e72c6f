from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from kit.cli.app import app
from tests.cases import slow
from tests.runs.conftest import MakeNotebook


def kit(*words: object) -> tuple[int, str]:
    done = CliRunner().invoke(app, [str(word) for word in words])
    return done.exit_code, done.output


def results(folder: Path) -> list[dict[str, object]]:
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*/result.json"))]


def test_a_notebook_that_runs_through_exits_with_0(make_notebook: MakeNotebook) -> None:
    path = make_notebook("assert (steps, rate, name) == (3, -0.5, 'a=b')")
    out = path.parent / "runs"
    code, output = kit(
        "run", path, "-p", "steps", 3, "-p", "rate", "-0.5", "-p", "name=a=b", "--out", out
    )
    assert code == 0, output
    assert [result["status"] for result in results(out)] == ["completed"]


def test_a_notebook_that_fails_exits_with_1(make_notebook: MakeNotebook) -> None:
    path = make_notebook("1 / 0")
    code, output = kit("run", path, "--out", path.parent / "runs")
    assert code == 1
    assert "ZeroDivisionError" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-p", "step", "3"], "Did you mean 'steps'?"),
        (["-p", "steps", "many"], "takes int"),
        (["-p", "steps"], "has no value"),
    ],
)
def test_a_wrong_call_exits_with_2_and_the_way_out(
    make_notebook: MakeNotebook, words: list[str], message: str
) -> None:
    code, output = kit("run", make_notebook("1"), *words)
    assert code == 2
    assert message in output
    assert "Traceback" not in output


def test_a_missing_notebook_exits_with_2(tmp_path: Path) -> None:
    assert kit("run", tmp_path / "none.ipynb")[0] == 2
    assert kit("params", tmp_path / "none.ipynb")[0] == 2


def test_params_lists_what_a_notebook_takes(make_notebook: MakeNotebook) -> None:
    code, output = kit("params", make_notebook())
    assert code == 0
    assert "steps: int = 5  # training steps" in output
    assert "takes no parameters" in kit("params", make_notebook("1", parameters=""))[1]


def test_version_names_the_kit_and_its_stack() -> None:
    code, output = kit("version")
    assert code == 0
    assert "kit 0." in output
    assert "sglang 0.5.16" in output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, *slow(signal.SIGTERM)])
def test_an_interrupt_ends_the_kernel_keeps_the_files_and_exits_with_130(
    make_notebook: MakeNotebook, number: signal.Signals
) -> None:
    path = make_notebook("import threading\nthreading.Event().wait()")
    out = path.parent / "runs"
    words = [sys.executable, "-m", "kit", "run", str(path), "--out", str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True) as run:
        assert run.stdout is not None
        shown = ""
        while "cell 2/2" not in shown and run.poll() is None:
            shown += run.stdout.readline()
        started = psutil.Process(run.pid).children(recursive=True)
        run.send_signal(number)
        output, _ = run.communicate(timeout=120)
    assert run.returncode == 130
    assert "Interrupted" in output
    assert started
    assert not any(process.is_running() for process in started)
    assert [result["status"] for result in results(out)] == ["interrupted"]


STARTS = """\
from kit import RLSession

session = RLSession.start("tiny")
print(session.config.seed, session.config.data.source, session.debug.stack.cluster.stack)
session.close()
"""


@pytest.mark.slow
def test_a_seed_and_a_preset_reach_a_session_that_no_parameter_does(
    make_notebook: MakeNotebook,
) -> None:
    from kit.cluster import registry

    path = make_notebook(STARTS)
    out = path.parent / "runs"
    options = ("--seed", 7, "--preset", "tiny-chain", "--out", out, "--keep-warm", 1)
    others = {entry.stack for entry in registry.living()}
    code, said = kit("run", path, *options)
    assert code == 0, said
    (entry,) = [each for each in registry.living() if each.stack not in others]
    assert f"kit doctor --stop {entry.name}" in said
    code, said = kit("run", path, *options[:-1], 0)
    assert code == 0, said
    shown = [json.loads(file.read_text())["cells"] for file in sorted(out.glob("*/*.ipynb"))]
    printed = {"".join(cells[-1]["outputs"][0]["text"]).strip() for cells in shown}
    assert printed == {f"7 tiny:chain {entry.stack}"}, "the second run has the first one's stack"
    assert not entry.alive


def test_a_seed_and_a_preset_go_to_the_parameters_of_that_name(
    make_notebook: MakeNotebook,
) -> None:
    code = 'assert (seed, preset, steps) == (3, "tiny-chain", 9)'
    own = 'seed: int = 0\npreset: str = "tiny"\nsteps: int = 1'
    path = make_notebook(code, parameters=own)
    values = path.parent / "values.yaml"
    values.write_text("steps: 8\n")
    words = ("-f", values, "-p", "steps", 9, "--seed", 3, "--preset", "tiny-chain", "--quiet")
    code, said = kit("run", path, *words, "--out", path.parent / "runs")  # type: ignore[assignment]
    assert code == 0, said
    assert "\x1b" not in said
    assert "\r" not in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "3"], "would have no effect"),
        (["--preset", "tiny"], "would have no effect"),
        (["--preset", "tinny"], "Did you mean 'tiny'?"),
        (["-p", "steps", "-1"], "cannot be -1"),
        (["-f", "none.yaml"], "cannot be read"),
    ],
)
def test_what_would_have_no_effect_or_cannot_be_is_refused(
    make_notebook: MakeNotebook, words: list[str], message: str
) -> None:
    path = make_notebook("1")
    code, said = kit("run", path, *words, "--out", path.parent / "runs")
    assert code == 2
    assert message in said
    assert not (path.parent / "runs").exists()
