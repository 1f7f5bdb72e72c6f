"""A stack's processes: what lives of them, and one of them to be killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from kit import RLSession
from kit.cluster import progress, registry
from kit.cluster.processes import TRAINER, engine

SCHEDULER, DETOKENIZER = 1, 2
ROOT = Path(__file__).parents[1]


def last_words(code: str, *arguments: str) -> Any:
    """The last line, as JSON, that a program printed before it killed itself."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def alive(head: int, directory: str) -> list[str]:
    """Processes of the stack's session, and any whose command line names its directory."""
    session = head if _is_head(head, directory) else None
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session or directory in " ".join(process.cmdline()):
                found.append(process.name())
        except (OSError, psutil.Error):
            continue
    return found


def _is_head(pid: int, directory: str) -> bool:
    """May processes of the session with this id be of that stack? Numbers are given again, but not
    while a session has them: if there is such a process now, it is the first of that session.
    """
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return True
    return f"{progress.DIRECTORY_ENV}={directory}".encode() in environment


def assert_gone(head: int, directory: str, seconds: float = 60) -> None:
    """Neither a process nor the directory of the stack is left, within so many seconds."""
    deadline = time.monotonic() + seconds
    while alive(head, directory) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(head, directory) == []
    assert not Path(directory).exists()


def leave_only(session: RLSession | None) -> None:
    """End all stacks of this test run but a session's, which is left warm."""
    kept = None
    if session:
        kept = session.debug.stack.cluster.stack
        session.close(keep_warm=True)
    for entry in registry.living():
        if entry.stack != kept:
            registry.terminate(entry)


def named_memory(pid: int | str) -> set[str]:
    """Files in shared memory that a process has open or in its address space, if they have a name
    still.
    """
    found: set[str] = set()
    with suppress(OSError):
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
        found |= {line.partition("/dev/shm/")[2] for line in lines if "/dev/shm/" in line}
    with suppress(OSError):
        for file in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.add(os.readlink(file).partition("/dev/shm/")[2])
    return found & set(os.listdir("/dev/shm"))


def of_engine(session: RLSession, index: int, which: int = 0) -> psutil.Process:
    """The engine's actor (0), its scheduler (1) or its detokenizer (2)."""
    return _members(session, engine(index))[which]


def of_trainer(session: RLSession) -> psutil.Process:
    return _members(session, TRAINER)[0]


def of_head(session: RLSession, which: int) -> psutil.Process:
    """The stack's first process (0), Ray's control service (1) or its raylet (2)."""
    return _members(session, "head")[which]


def kill(process: psutil.Process) -> None:
    """As a lack of memory does, and wait until it is gone."""
    process.kill()
    process.wait(30)


def _members(session: RLSession, part: str) -> list[psutil.Process]:
    return session.debug.stack.watch.members(part)
