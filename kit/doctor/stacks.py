"""Finds the kit's stacks on this machine, living or abandoned, and ends a user's own.

Of other users it tells what their sessions hold, and neither who they are nor what they do.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from kit.cluster import lease, processes, registry
from kit.cluster.folder import stacks_root
from kit.doctor.machine import program
from kit.errors import SessionError, did_you_mean
from kit.reports.diagnostics import Finding
from kit.utils.formatting import count, data_size, duration, in_gib
from kit.utils.hardware import Card

HEAD = "kit.cluster.head"
LOG = "head.log"
"""Every stack writes one; by it a folder is known to be a stack's."""
LEFTOVERS = "leftovers"
OWN = "the session of this process"


@dataclass(frozen=True, slots=True)
class LivingStack:
    """The processes of one session."""

    directory: Path
    processes: int
    memory: int
    """Bytes that they have to themselves."""
    client: int | None
    """The process that drives it; None where it is gone."""
    stack: str = ""
    """Id of the stack."""
    name: str = ""
    """Name of the session; empty for one of another user."""
    folder: str = ""
    """Where its driver works or worked."""
    ends_in: float | None = None
    """Seconds until it ends by itself, while nobody drives it."""
    warm: bool = False
    ports: tuple[int, ...] = ()
    """On which its processes listen."""


@dataclass(frozen=True, slots=True)
class OthersUse:
    """What the sessions of other users hold together."""

    sessions: int
    processes: int
    memory: int
    """Bytes, without files and shared memory."""
    cores: float
    """How many they keep busy."""
    device: int = 0
    """Bytes of GPUs, as far as the driver tells."""


LOOK_SECONDS = 0.3
"""How long the others' processor time is watched."""


def living() -> list[LivingStack]:
    """This user's stacks whose head is alive."""
    names = {entry.stack: entry.name for entry in registry.living()}
    found = []
    for head, directory in _heads(own=True):
        with contextlib.suppress(OSError, psutil.Error, KeyError):
            stack = head.environ()[processes.MARK]
            members = processes.of_stack(stack, head.pid)
            state = lease.state_of(directory) or {}
            found.append(
                LivingStack(
                    directory,
                    len(members),
                    processes.own_memory(members),
                    state.get("driver"),
                    stack,
                    names.get(stack, ""),
                    state.get("folder", ""),
                    state.get("ends_in"),
                    bool(state.get("warm")),
                    _ports(members),
                )
            )
    return found


def _heads(*, own: bool) -> Iterator[tuple[psutil.Process, Path]]:
    """Heads of stacks and their folders: this user's own, or those of all others."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ValueError, IndexError):
            words = process.cmdline()
            directory = Path(words[words.index(HEAD) + 1])
            if (process.uids().real == os.getuid()) == own:
                yield process, directory


def others(cards: Iterable[Card] = ()) -> OthersUse | None:
    """What the sessions of other users hold; None where there are none, or none may be seen.

    Args:
        cards: GPUs, with the processes that hold memory of each.
    """
    heads = [head for head, _ in _heads(own=False)]
    if not heads:
        return None
    members = {process.pid: process for head in heads for process in _family(head)}
    begin, before = time.monotonic(), _processor_seconds(members)
    time.sleep(LOOK_SECONDS)
    used, after = 0.0, _processor_seconds(members)
    for pid, seconds in after.items():
        used += seconds - before.get(pid, seconds)
    held = [each for card in cards for each in card.processes if each.pid in members]
    return OthersUse(
        len(heads),
        len(members),
        processes.own_memory([*members.values()]),
        used / (time.monotonic() - begin),
        sum(each.memory or 0 for each in held),
    )


def _family(head: psutil.Process) -> Iterator[psutil.Process]:
    """Processes of somebody else's stack: their mark cannot be read, their parents can."""
    yield head
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if process.pid != head.pid and os.getsid(process.pid) == head.pid:
                yield process
    with contextlib.suppress(psutil.Error):
        yield from head.children(recursive=True)


def _processor_seconds(members: Mapping[int, psutil.Process]) -> dict[int, float]:
    found = {}
    for pid, process in members.items():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            found[pid] = times.user + times.system
    return found


def _ports(members: list[psutil.Process]) -> tuple[int, ...]:
    found = set()
    for process in members:
        with contextlib.suppress(psutil.Error):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add(int(connection.laddr.port))
    return tuple(sorted(found))


def abandoned(alive: list[LivingStack], folder: Path) -> list[Path]:
    """Folders of this user's stacks whose processes are gone."""
    used = {stack.directory for stack in alive}
    found = []
    for path in sorted(folder.glob("kit-*")):
        with contextlib.suppress(OSError):
            ours = path.is_dir() and path.stat().st_uid == os.getuid()
            # A head that is being started has no command line yet by which it could be found.
            starts = lease.is_open(path)
            if ours and path not in used and (path / LOG).is_file() and not starts:
                found.append(path)
    return found


def findings(alive: list[LivingStack], elsewhere: OthersUse | None = None) -> Iterator[Finding]:
    """One finding per living stack and one for all abandoned ones, or one that there is nothing.

    Args:
        alive: what `living` returned.
        elsewhere: what `others` returned.
    """
    if elsewhere:
        yield _others(elsewhere)
    for stack in alive:
        yield _living(stack)
    left = abandoned(alive, stacks_root())
    if left:
        orphans = sum(len(registry.find_orphans(folder)) for folder in left)
        names = ", ".join(path.name for path in left[:5]) + (", ..." if len(left) > 5 else "")
        still = f" {count(orphans, 'process', 'processes')} of theirs still run." if orphans else ""
        yield Finding(
            LEFTOVERS,
            "note",
            f"{count(len(left), 'folder')} of stacks that have ended: {names}.{still}",
            "Nobody uses them. They can be removed.",
            (f"{program('kit')} doctor --stop {LEFTOVERS}",),
        )
    files = processes.unowned_loads()
    if files:
        yield Finding(
            "shared memory",
            "note",
            f"{count(len(files), 'file')} in {processes.SHARED_MEMORY} of engines that have ended.",
            "Nobody uses them. They can be removed.",
            (f"{program('kit')} doctor --stop {LEFTOVERS}",),
        )
    if not alive and not left:
        yield Finding("other stacks", "ok", "none of yours, and nothing left of any")


def _others(use: OthersUse) -> Finding:
    found = (
        f"{count(use.sessions, 'session')} of other users: "
        f"{count(use.processes, 'process', 'processes')}, {data_size(use.memory)} of memory, "
        f"{use.cores:.1f} of {os.cpu_count()} cores busy"
    )
    if use.device:
        found += f", {in_gib(use.device)} of GPU memory"
    return Finding(
        "other users",
        "note",
        f"{found}.",
        "They share the machine with you: starts and steps may take longer. "
        f"{processes.CORES_VARIABLE}=2, set before a start, leaves the other cores to others.",
    )


def _living(stack: LivingStack) -> Finding:
    size = f"{count(stack.processes, 'process', 'processes')}, {data_size(stack.memory)}"
    if stack.ports:
        size += f", {count(len(stack.ports), 'port')} from {stack.ports[0]} to {stack.ports[-1]}"
    name = f"session {stack.name!r}" if stack.name else "one"
    found = f"{name} is alive in {stack.directory} ({size})"
    stop = (f"{program('kit')} doctor --stop {stack.stack}",) if stack.name else ()
    if stack.client == os.getpid():
        return Finding("other stacks", "ok", f"{found}: {OWN}")
    ends = f"It ends by itself in {duration(stack.ends_in)}." if stack.ends_in is not None else ""
    if stack.warm:
        return Finding("other stacks", "ok", f"{found}: left warm for the next start. {ends}")
    if stack.client is None and stack.ends_in is not None:
        return Finding(
            "other stacks",
            "note",
            f"{found}: the kernel that drove it is gone. {ends}",
            f"Go on with it, RLSession.attach({stack.name!r}), or end it.",
            stop,
        )
    by = (
        f"driven by process {stack.client}, in {stack.folder}"
        if stack.client
        else "and does not answer"
    )
    return Finding(
        "other stacks",
        "note",
        f"{found}, {by}.",
        "It takes its share of the machine. If it is yours and done with, close it in its "
        "notebook (session.close(), or shut the kernel down), or end it from here.",
        stop,
    )


def stop(what: str) -> str:
    """End a session, or what dead ones have left; returns a sentence on what was ended.

    Only what the kit has started is ended, and it is told by identity: a mark that each process of
    a stack carries, and when its head started.

    Args:
        what: a session's name, its id or the first letters of that, or `leftovers`.

    Raises:
        SessionError: there is none, or there are several.
    """
    if what == LEFTOVERS:
        with registry.locked():  # a folder whose head is being started is no leftover
            folders = abandoned(living(), stacks_root())
            ended = sum(map(registry.remove, folders))
        files = processes.unowned_loads()
        for file in files:
            file.unlink(missing_ok=True)
        return (
            f"Removed {count(len(folders), 'folder')} of stacks that had ended, "
            f"{count(ended, 'process', 'processes')}, and {count(len(files), 'file')} in shared "
            "memory."
        )
    entries = registry.living()
    found = [e for e in entries if what in (e.name, e.stack)]
    found = found or [e for e in entries if len(what) >= 4 and e.stack.startswith(what)]
    if not found:
        known = {e.name for e in entries}
        raise SessionError(
            f"There is no session {what!r} of yours on this machine.",
            fix=did_you_mean(what, known) if known else "there is none that could be stopped.",
        )
    if len(found) > 1:
        raise SessionError(
            f"{len(found)} sessions are named {what!r}.",
            fix=f"give the id of the one you mean: {', '.join(e.stack for e in found)}.",
        )
    (entry,) = found
    number = count(registry.terminate(entry), "process", "processes")
    return f"Ended the session {entry.name!r}: {number}; nothing of it is left."
