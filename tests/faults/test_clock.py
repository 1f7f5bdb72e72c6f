"""A clock that is set while a session runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from kit import RLSession
from tests.faults import clock_session
from tests.processes import assert_gone

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.usefixtures("alone")
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no compiler for C")
def test_a_clock_that_is_set_by_hours_changes_no_step_and_ends_no_lease(tmp_path: Path) -> None:
    library = tmp_path / "clock.so"
    source = HERE / "clock.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    environment = os.environ | {
        "PYTHONPATH": str(HERE.parents[1]),
        "CLOCK_AHEAD": str(tmp_path / "ahead"),
        "LD_PRELOAD": str(library),
    }
    command = [sys.executable, "-m", clock_session.__name__, "clock"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["jumped"] >= clock_session.FORWARD  # it was set indeed
    assert found["set"] == found["usual"]
    (age,) = found["ages"]
    assert 0 < age < clock_session.HOURS
    with RLSession.attach("clock") as session:
        assert session.step_count == 2
        assert session.step().step == 2
        entry = session.debug.stack.cluster.entry
    assert_gone(entry.head, entry.directory)
