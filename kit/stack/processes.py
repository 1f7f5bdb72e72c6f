"""Which processes belong to a stack: told by process session and by a mark, never by name."""

from __future__ import annotations

import contextlib
import os

import psutil

MARK = "KIT_STACK"
"""Environment variable that every process of a stack inherits; its value names the stack."""


def of_stack(stack: str, head: int) -> list[psutil.Process]:
    """Every living process of a stack, except the caller.

    Args:
        stack: the value of the mark. A program that renames itself, as Ray's do, loses it.
        head: process id of the head, which is the id of the stack's process session. A program
            that starts a session of its own loses that.
    """
    wanted = f"{MARK}={stack}".encode()
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        with contextlib.suppress(OSError, psutil.Error):
            with open(f"/proc/{process.pid}/environ", "rb") as file:
                marked = wanted in file.read().split(b"\0")
            ours = marked or os.getsid(process.pid) == head
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def own_memory(processes: list[psutil.Process]) -> int:
    """Bytes of memory that they have to themselves, together; files and shared pages left out."""
    total = 0
    for process in processes:
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info()
            total += max(memory.rss - memory.shared, 0)
    return total


def end(processes: list[psutil.Process]) -> None:
    """Kill them and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)
