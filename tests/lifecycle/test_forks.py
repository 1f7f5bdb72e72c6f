"""Children that a session's process forks, and a session whose variable was lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.lifecycle import forked_session
from tests.processes import assert_gone
from tests.tracking.read_back import tensorboard

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the script found, and what it left."""
    folder = tmp_path_factory.mktemp("forked")
    command = [sys.executable, "-m", forked_session.__name__, str(folder)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1]) | {"folder": folder, "stderr": ended.stderr}


@pytest.mark.slow
def test_a_child_that_exits_leaves_the_session_to_its_parent(found: dict[str, Any]) -> None:
    assert (found["exit"], found["failure"], found["verbs"]) == (0, 1, 0)
    assert found["driver"]
    assert found["step"] == 0


@pytest.mark.slow
def test_a_verb_in_a_forked_child_is_refused_at_once(found: dict[str, Any]) -> None:
    told = dict(found["told"])
    assert told.pop("current") == "it returned None"
    assert set(told) == {*forked_session.VERBS, "start", "attach"}
    for words in told.values():
        assert "forked" in words
        assert "spawn" in words


@pytest.mark.slow
def test_a_pool_of_forked_processes_works_beside_a_session(found: dict[str, Any]) -> None:
    assert found["pool"] == [1, 2, 3]


@pytest.mark.slow
def test_a_child_that_lives_on_keeps_no_logger_from_its_end(found: dict[str, Any]) -> None:
    assert "Logging to" not in found["stderr"]
    (written,) = {file.parent for file in found["folder"].rglob("events*")}
    scalars, _ = tensorboard(written)
    assert [step for step, _ in scalars["rollout/raw_reward"]] == [0, 1]


@pytest.mark.slow
def test_a_session_whose_variable_was_lost_is_given_back_and_closed_at_the_end(
    found: dict[str, Any],
) -> None:
    assert found["given back"]
    assert "RLSession.current()" in found["passed"]
    assert found["step after"] == 1
    directory, head = found["stack"]
    assert_gone(head, directory)
