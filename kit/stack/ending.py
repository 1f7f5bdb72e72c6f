"""Ends a stack from outside: by what it is, never by a name that others may have.

A stack whose head was killed can leave processes and its folder behind. In the folder lies who the
head was, so that its processes are known even then.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import psutil

from kit.stack import processes, registry
from kit.stack.control import Connection
from kit.stack.registry import Entry

PATIENCE = 10.0
"""Seconds in which a head takes its stack down."""
IDENTITY = "identity.json"


def end(entry: Entry) -> int:
    """End every process of a stack and remove its folder; how many there were."""
    members = _members(entry.stack, entry.head, entry.head_started)
    with contextlib.suppress(OSError, ValueError):
        connection = Connection(entry.folder)
        connection.ask("end")
        connection.close()
        psutil.wait_procs(members, timeout=PATIENCE)
    processes.end(_members(entry.stack, entry.head, entry.head_started))
    shutil.rmtree(entry.folder, ignore_errors=True)
    registry.forget(entry.stack)
    return len(members)


def leave_identity(entry: Entry) -> None:
    """Write into a stack's folder who its head is."""
    text = json.dumps([entry.stack, entry.head, entry.head_started])
    (entry.folder / IDENTITY).write_text(text)


def left_in(folder: Path) -> list[psutil.Process]:
    """The processes of the stack to which this folder belonged, whose head is gone."""
    try:
        stack, head, head_started = json.loads((folder / IDENTITY).read_text())
    except (OSError, ValueError):
        return []
    return _members(str(stack), int(head), str(head_started))


def remove(folder: Path) -> int:
    """End what is left of a stack and remove its folder; how many processes there were."""
    members = left_in(folder)
    processes.end(members)
    shutil.rmtree(folder, ignore_errors=True)
    return len(members)


def _members(stack: str, head: int, head_started: str) -> list[psutil.Process]:
    # While a process of its session lives, the head's number is given to nobody else. Where
    # somebody has it, the session is gone, and only the mark tells.
    ours = registry.started(head) in (None, head_started)
    return processes.of_stack(stack, head if ours else -1)
