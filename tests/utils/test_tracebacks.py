"""What a notebook shows of an error of the kit."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import kit
from kit.config import TrainingConfig
from kit.errors import RewardError
from kit.rollout.batch import make_batch
from kit.samples import Rollout, Sample
from kit.utils.tracebacks import without_internals

ROOT = Path(__file__).parents[2]


def in_ipython(cell: str, **environment: str) -> str:
    """What IPython shows of a cell."""
    code = f"""
        from IPython.core.interactiveshell import InteractiveShell
        shell = InteractiveShell.instance()
        shell.run_line_magic("colors", "nocolor")
        shell.run_cell("import kit")
        shell.run_cell({cell!r})
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={"PYTHONPATH": str(ROOT), "HOME": "/tmp", "PATH": "/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return done.stdout + done.stderr


CELL = "kit.SessionConfig.preset('tinny')"


def test_an_error_of_the_kit_shows_the_cells_line_and_what_to_do_but_no_frames_of_the_kit() -> None:
    shown = in_ipython(CELL)
    assert "There is no preset 'tinny'" in shown
    assert "Did you mean 'tiny'" in shown
    assert CELL in shown
    assert "schema.py" not in shown
    assert "schema.py" in in_ipython(CELL, KIT_TRACEBACK="full")


def test_an_interrupted_wait_is_a_sentence() -> None:
    shown = in_ipython("from kit.utils.tracebacks import *; raise WaitingEndedError('It goes on.')")
    assert "It goes on." in shown
    assert "Traceback" not in shown


def test_frames_of_a_users_own_function_that_the_kit_called_are_kept() -> None:
    def refuses(rollout: Rollout) -> list[float]:
        raise RewardError("mine")

    with pytest.raises(RewardError) as caught:
        make_batch(Rollout([Sample(reward=1.0, response_length=1)]), TrainingConfig(), ask, refuses)
    trace, names = without_internals(caught.tb), list[str]()
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names == [
        "test_frames_of_a_users_own_function_that_the_kit_called_are_kept",
        "refuses",
    ]


def ask(*_: object) -> list[list[float]]:
    return []


def test_tab_shows_the_api_and_nothing_else() -> None:
    shown = {name for name in dir(kit) if not name.startswith("__")}
    assert shown == {name for name in kit.__all__ if not name.startswith("__")}
    assert kit.RLSession.__name__ == "RLSession"
