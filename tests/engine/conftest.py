"""Runs tests marked `in_sglang` in one child process that has the CPU's SGLang imported.

SGLang has to find its environment, and the kit's stand-ins, before it is imported, and it changes
much of the process that imports it. So the tests' own process never does. The import takes ten
seconds and more; the child is started for the first marked test and serves all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from kit.cluster.client import CPU_OPERATORS, PACKAGE_ROOT

INSIDE = "KIT_TESTS_IN_SGLANG"
CHILD = Path(__file__).with_name("in_sglang.py")


class Child:
    """The child process: takes the name of a test, gives its reports."""

    def __init__(self, root: Path) -> None:
        paths = [str(CPU_OPERATORS), str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")]
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd=root,
            env=os.environ
            | {
                INSIDE: "1",
                "SGLANG_USE_CPU_ENGINE": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "TORCHDYNAMO_DISABLE": "1",
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            },
        )

    def run(self, test: str) -> list[dict[str, Any]]:
        """The serialised reports of a test. Fails with the child's last words where it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(test + "\n")
            self._process.stdin.flush()
            reports: list[dict[str, Any]] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError):
            self._errors.seek(0)
            pytest.exit(f"The process for SGLang's tests died:\n{self._errors.read()[-3000:]}", 1)
        return reports

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


CHILD_OF = pytest.StashKey[Child]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "in_sglang: runs in a process that has SGLang for the CPU")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if os.environ.get(INSIDE) or not item.get_closest_marker("in_sglang"):
        return None
    stash = item.config.stash
    if CHILD_OF not in stash:
        stash[CHILD_OF] = Child(item.config.rootpath)
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in stash[CHILD_OF].run(item.nodeid):
        report = hook.pytest_report_from_serializable(config=item.config, data=data)
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # of the tests before, what none needs now
    return True


def pytest_unconfigure(config: pytest.Config) -> None:
    if CHILD_OF in config.stash:
        config.stash[CHILD_OF].close()
