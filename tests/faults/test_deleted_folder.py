"""The working directory is deleted under a session, and under the commands."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.errors import KitError
from tests.runs.conftest import write_notebook

ROOT = Path(__file__).parents[2]
SAYS = "working directory of this process was deleted"


@pytest.fixture
def deleted(session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory that was deleted after the session had started."""
    folder = tmp_path / "deleted"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()


def outcome(call: Any, *arguments: Any, **named: Any) -> str:
    """Whether a call works, or what its error says."""
    try:
        call(*arguments, **named)
    except KitError as error:
        return str(error)
    return "works"


@pytest.mark.slow
@pytest.mark.usefixtures("deleted")
def test_with_the_working_directory_deleted_every_verb_works_or_names_it(
    session: RLSession, tmp_path: Path
) -> None:
    step = session.step()
    batch = session.advantages(step.rollout)
    calls: dict[str, tuple[Any, ...]] = {
        "score": (step.rollout,),
        "try_reward": ("exact",),
        "advantages": (step.rollout,),
        "log_probs": (step.rollout.samples[:2],),
        "annotate": (step.rollout[0],),
        "update": (batch,),
        "replay": (tmp_path / "no run",),
        "restore": (Path("checkpoints/none"),),
        "train": (1,),
        "configure": ({"training.learning_rate": 1e-3},),
        "what_if": (1e-3,),
        "fork": ("further",),
        "generate_together": ([session],),
    }
    leave_alone = {"start", "attach", "load", "close", "keep", "forget", "dashboard"}
    verbs = [
        name
        for name, value in inspect.getmembers(RLSession, inspect.isfunction)
        if not name.startswith("_") and name not in leave_alone
    ]
    said = {name: outcome(getattr(session, name), *calls.get(name, ())) for name in verbs}
    named = {name for name, words in said.items() if SAYS in words}
    assert named == {"save", "export_hf", "restore"}, said
    others = {name for name, words in said.items() if words != "works"} - named
    # There is no run, and no adapter to be forked or to write beside others.
    assert others <= {"replay", "fork", "generate_together"}, said
    assert SAYS in outcome(session.snapshot, "kept", on_disk=True)
    assert SAYS in outcome(RLSession.load, "checkpoints/none")
    assert outcome(session.save, tmp_path / "elsewhere") == "works"
    assert "deleted" in str(session.doctor())
    assert session.step().update.applied


@pytest.mark.slow
def test_with_the_working_directory_deleted_every_command_works_or_names_it(
    tmp_path: Path,
) -> None:
    notebook = write_notebook(tmp_path, "1")
    script = tmp_path / "launch.sh"
    script.write_text("python train.py --rollout-batch-size 8\n")
    calls = [
        ["version"],
        ["doctor"],
        ["doctor", "--stop", "leftovers"],
        ["runs"],
        ["compare", "one", "other"],
        ["params", str(notebook)],
        ["params", "lesson.ipynb"],
        ["run", "lesson.ipynb"],
        ["run", "--resume", "last"],
        ["sweep", "lesson.ipynb", "-p", "steps=1,2"],
        ["export", "miles", "tiny"],
        ["import", "miles", str(script)],
    ]
    code = f"""
        import json, os, sys
        from typer.testing import CliRunner
        os.mkdir("gone")
        os.chdir("gone")
        os.rmdir("../gone")
        from kit.cli.app import app
        runner, found = CliRunner(), []
        for call in {calls!r}:
            ended = runner.invoke(app, call)
            found.append([ended.exit_code, ended.output, repr(ended.exception)])
        print(json.dumps(found))
    """
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": str(tmp_path / "state"),
    }
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    for call, (code_, said, error) in zip(
        calls, json.loads(ended.stdout.splitlines()[-1]), strict=True
    ):
        assert error in ("None", f"SystemExit({code_})"), (call, said, error)
        assert "Traceback" not in said, (call, said)
