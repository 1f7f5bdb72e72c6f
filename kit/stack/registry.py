"""The stacks of this user on this machine: one small file each, which only the user can read.

A file tells how a living stack is reached (folder, Ray's address and token) and what it is (name,
device, what it was started with). It is written by who starts a stack and removed by the stack's
head. A file whose head is gone is stale: heads are told apart by process id, the moment at which
they started, and the boot of the machine, so a process that got the same number later is not taken
for one.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import psutil

from kit.errors import StackError


@dataclass(frozen=True, slots=True)
class Entry:
    """A stack as its file tells of it."""

    stack: str
    """Its own id, the value of the mark that each of its processes carries."""
    name: str
    """Of the session."""
    head: int
    """Process id of the head."""
    head_started: str
    """When that process started; see `started`."""
    host: str
    directory: str
    token: str
    device: str
    created: float
    """In seconds of `time.time()`."""
    card: str = ""
    """Which GPUs, by the numbers that they carry, between commas."""
    device_gib: float | None = None
    """Its share of the GPU; None takes all."""
    fingerprint: str = ""
    """What its processes were started with; empty while it starts."""
    address: str = ""
    """Of the Ray cluster that it has joined; empty where it has a head of its own."""
    group: str = ""
    """Of runs that share a stack; empty outside of one."""

    @property
    def folder(self) -> Path:
        """The stack's directory."""
        return Path(self.directory)

    @property
    def ready(self) -> bool:
        """Has it started?"""
        return bool(self.fingerprint)

    @property
    def alive(self) -> bool:
        """Is its head running?"""
        return started(self.head) == self.head_started

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """None for a file that is gone, unreadable, or of another version of the kit."""
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            return cls(**row) if row.keys() <= {f.name for f in fields(cls)} else None
        except (OSError, ValueError, TypeError, AttributeError):
            return None


def folder() -> Path:
    """Where the files are; made where it is missing.

    Raises:
        StackError: it belongs to somebody else.
    """
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    place = Path(base) / "kit" / "stacks"
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        writable = os.access(place, os.W_OK)
    except OSError:
        writable = False
    if not writable:  # no home, or one that is read-only
        place = Path(tempfile.gettempdir()) / f".kit-stacks-{os.getuid()}"
        place.mkdir(exist_ok=True, mode=0o700)
    status = place.stat()
    if status.st_uid != os.getuid():
        raise StackError(
            f"{place} belongs to another user.",
            why="It would hold the tokens with which your sessions are reached.",
            fix="set XDG_STATE_HOME to a folder of your own.",
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        place.chmod(0o700)
    return place


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Nobody else starts or takes a stack meanwhile."""
    with (folder() / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(entry: Entry) -> None:
    """Put a stack's file there, or a new version of it, in one move."""
    target = folder() / f"{entry.stack}.json"
    partial = target.with_suffix(f".partial-{os.getpid()}")
    with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(entry), file)
    partial.replace(target)


def forget(stack: str) -> None:
    """Remove a stack's file, if it is there."""
    with contextlib.suppress(OSError, StackError):
        (folder() / f"{stack}.json").unlink(missing_ok=True)


def living() -> list[Entry]:
    """Every stack of this user on this machine whose head runs, the oldest first. Files of heads
    that are gone are removed.
    """
    found = []
    for file in folder().glob("*.json"):
        entry = Entry.read(file)
        if entry is None or entry.host != socket.gethostname():
            continue
        if entry.alive:
            found.append(entry)
        else:
            forget(entry.stack)
    return sorted(found, key=lambda entry: entry.created)


def new(stack: str, head: int, directory: Path, token: str, **what: Any) -> Entry:
    """The entry of a stack whose head was started just now."""
    return Entry(
        stack=stack,
        head=head,
        head_started=started(head) or "",
        host=socket.gethostname(),
        directory=str(directory),
        token=token,
        created=time.time(),
        **what,
    )


def started(pid: int) -> str | None:
    """The boot of the machine, and the clock tick since then at which a process started; None
    where there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program, in brackets, may itself hold brackets and blanks.
            after = file.read().rpartition(b")")[2].split()
        if after[0] == b"Z":
            return None
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {int(after[19])}"
    except OSError:
        return None


def process(entry: Entry) -> psutil.Process | None:
    """The head, if it is the one that the entry means."""
    with contextlib.suppress(psutil.Error):
        head = psutil.Process(entry.head)
        return head if entry.alive else None
    return None
