"""What lives of a stack, found by what it is and not by its name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil


def alive(head: int, directory: str) -> list[str]:
    """Processes of the stack's session, and any whose command line names its directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == head or directory in " ".join(process.cmdline()):
                found.append(process.name())
        except (OSError, psutil.Error):
            continue
    return found


def assert_gone(head: int, directory: str, seconds: float = 60) -> None:
    """Neither a process nor the directory of the stack is left, within so many seconds."""
    deadline = time.monotonic() + seconds
    while alive(head, directory) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert alive(head, directory) == []
    assert not Path(directory).exists()
