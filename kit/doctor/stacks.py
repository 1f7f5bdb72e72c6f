"""Stacks of the kit on this machine: those that live, and what dead ones left. Listed only."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from kit.doctor.findings import Finding
from kit.stack import processes
from kit.viz.text import count, data_size

HEAD = "kit.stack.head"
LOG = "head.log"
"""Every stack writes one; by it a folder is known to be a stack's."""


@dataclass(frozen=True, slots=True)
class LivingStack:
    """The processes of one session."""

    directory: Path
    processes: int
    memory: int
    """Bytes that they have to themselves."""
    client: int | None
    """The process that started it and whose end will end it; None where it is gone."""


def living() -> list[LivingStack]:
    """Every stack whose head lives and whose processes may be looked at."""
    found = []
    for head in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error, ValueError, IndexError):
            words = head.cmdline()
            directory = Path(words[words.index(HEAD) + 1])
            stack = head.environ()[processes.MARK]
            members = processes.of_stack(stack, head.pid)
            client = head.ppid() if head.ppid() > 1 else None
            found.append(
                LivingStack(directory, len(members), processes.own_memory(members), client)
            )
    return found


def abandoned(alive: list[LivingStack], folder: Path) -> list[Path]:
    """Folders of this user's stacks whose processes are gone."""
    used = {stack.directory for stack in alive}
    found = []
    for path in sorted(folder.glob("kit-*")):
        with contextlib.suppress(OSError):
            ours = path.is_dir() and path.stat().st_uid == os.getuid()
            if ours and path not in used and (path / LOG).is_file():
                found.append(path)
    return found


def findings(alive: list[LivingStack]) -> Iterator[Finding]:
    """One a living stack and one for everything abandoned; or one that says there is nothing."""
    for stack in alive:
        yield _living(stack)
    left = abandoned(alive, Path(tempfile.gettempdir()))
    if left:
        yield Finding(
            "leftovers",
            "note",
            f"{count(len(left), 'folder')} of stacks that have ended: "
            f"{', '.join(path.name for path in left[:5])}{', ...' if len(left) > 5 else ''}.",
            "Nothing uses them. They can be removed.",
            (f"rm -r {' '.join(map(str, left[:5]))}",),
        )
    if not alive and not left:
        yield Finding("other stacks", "ok", "none on this machine, and nothing left of any")


def _living(stack: LivingStack) -> Finding:
    size = f"{count(stack.processes, 'process', 'processes')}, {data_size(stack.memory)}"
    found = f"one is alive in {stack.directory} ({size})"
    if stack.client == os.getpid():
        return Finding("other stacks", "ok", f"{found}: the session of this process")
    return Finding(
        "other stacks",
        "note",
        f"{found}, started by process {stack.client}.",
        "It takes its share of the machine. If it is yours and done with, close it in its "
        "notebook: session.close(), or shut the kernel down.",
    )
