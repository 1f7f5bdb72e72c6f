"""Which processes belong to a stack, found by a mark in their environment and never by name."""

from __future__ import annotations

import contextlib
import os
import signal

import psutil

MARK = "KIT_STACK"
"""Environment variable that every process of a stack inherits; its value names the stack."""


def of_stack(stack: str) -> list[psutil.Process]:
    """Every living process that carries the mark of this stack, except the caller."""
    found = []
    wanted = f"{MARK}={stack}".encode()
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(OSError, psutil.Error):
            # /proc, not psutil's environ(): it reads the environment at the program's start, which
            # a fork shares with its parent.
            with open(f"/proc/{process.pid}/environ", "rb") as file:
                environment = file.read().split(b"\0")
            if wanted in environment and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def end(processes: list[psutil.Process], grace: float) -> None:
    """Ask each to end, and after `grace` seconds kill what is left."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(processes, timeout=grace)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
