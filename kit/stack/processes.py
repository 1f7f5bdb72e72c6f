"""Which processes belong to a stack: told by process session and by a mark, never by name."""

from __future__ import annotations

import contextlib
import os

import psutil

SHARED_MEMORY = "/dev/shm/"
TRACKER_SECONDS = 3.0
"""How long Python's resource trackers get to remove what the others have left."""
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
    """Kill them, wait until they are gone, and remove what they had in shared memory."""
    shared = [file for process in processes for file in segments(process)]
    trackers = [process for process in processes if _is_tracker(process)]
    others = [process for process in processes if process not in trackers]
    for process in others:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(others, timeout=10)
    _, left = psutil.wait_procs(trackers, timeout=TRACKER_SECONDS)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)
    for file in shared:
        with contextlib.suppress(OSError):
            os.unlink(file)


def segments(process: psutil.Process) -> list[str]:
    """Files in shared memory that it has open and that still have a name, as SGLang's have."""
    found = []
    with contextlib.suppress(OSError):
        for number in os.listdir(folder := f"/proc/{process.pid}/fd"):
            with contextlib.suppress(OSError):
                file = os.readlink(f"{folder}/{number}")
                if file.startswith(SHARED_MEMORY) and not file.endswith(" (deleted)"):
                    found.append(file)
    return found


def _is_tracker(process: psutil.Process) -> bool:
    """Is it Python's, which removes named semaphores when all that could use them are gone?"""
    with contextlib.suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    return False
