"""Registry of this user's stacks on this machine: one small private file each.

A file tells how a living stack is reached (folder, Ray's address and token) and what it is (name,
device, what it was started with). It is written by who starts a stack and removed by the stack's
head. A file whose head is gone is stale: heads are told apart by process id, the moment at which
they started, and the boot of the machine, so a process that got the same number later is not taken
for one.

`terminate` ends a stack from outside. A stack whose head was killed can leave processes and its
folder behind; an identity file in the folder tells which processes are its own even then.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import psutil

from kit.cluster import processes
from kit.cluster.lease import Connection
from kit.errors import StackError
from kit.utils.files import replacing_file
from kit.utils.pids import started
from kit.utils.reading import read_json, read_object


@dataclass(frozen=True, slots=True)
class Entry:
    """Contents of a stack's file."""

    stack: str
    """Id of the stack, the value of the mark that each of its processes carries."""
    name: str
    """The session's."""
    head: int
    """Process id of the head."""
    head_started: str
    """When that process started, as `pids.started` says it."""
    host: str
    directory: str
    token: str
    device: str
    created: float
    """In seconds of `since_boot()`."""
    card: str = ""
    """Which GPUs, by the numbers that they carry, between commas."""
    device_gib: float | None = None
    """GiB of the GPU that it may take; None takes all."""
    fingerprint: str = ""
    """What its processes were started with; empty while it starts."""
    address: str = ""
    """Address of the Ray cluster that it has joined; empty where it has a head of its own."""
    group: str = ""
    """Group of runs that share a stack; empty outside of one."""

    @property
    def folder(self) -> Path:
        """Directory of the stack."""
        return Path(self.directory)

    @property
    def ready(self) -> bool:
        """Whether it has started."""
        return bool(self.fingerprint)

    @property
    def plain(self) -> bool:
        """Whether each field is of its type, and its name one that a file can have."""
        texts = (self.stack, self.name, self.head_started, self.host, self.directory, self.token)
        more = (self.device, self.card, self.fingerprint, self.address, self.group)
        numbers = (self.created, self.head, self.device_gib or 0)
        return (
            all(isinstance(text, str) for text in (*texts, *more))
            and all(type(number) in (int, float) for number in numbers)
            and type(self.head) is int
            and 0 < self.head < 2**31
            and "/" not in self.stack
            and "\0" not in self.stack + self.directory
        )

    @property
    def alive(self) -> bool:
        """Whether its head is running."""
        return started(self.head) == self.head_started

    @classmethod
    def read(cls, file: Path) -> Self | None:
        """Read a file; None if it is gone, unreadable, or of another version of the kit."""
        try:
            if os.lstat(file).st_uid != os.getuid():
                return None
            row = read_object(file)
            entry = cls(**row) if row.keys() <= {f.name for f in fields(cls)} else None
        except (OSError, ValueError, TypeError):
            return None
        return entry if entry and entry.plain else None


def folder() -> Path:
    """Folder of the files, made where it is missing; only its owner may look into it.

    Raises:
        StackError: it, or a link in its place, belongs to somebody else, or it cannot be made.
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
        with contextlib.suppress(FileExistsError):
            os.mkdir(place, 0o700)
    _make_private(place)
    return place


def _make_private(place: Path) -> None:
    """Let nobody else look into a folder. Raises StackError where it is not this user's own.

    Where all may write, anybody can put a link in its place: to a folder of theirs, or to one of
    this user's. So the name itself is looked at before what it leads to.
    """
    fix = "set XDG_STATE_HOME to a folder of your own."
    try:
        mine = os.lstat(place).st_uid == os.getuid()
        handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC) if mine else None
    except OSError as error:
        raise StackError(f"{place} cannot be used: {error.strerror}.", fix=fix) from None
    try:
        if handle is None or (status := os.fstat(handle)).st_uid != os.getuid():
            raise StackError(
                f"{place} belongs to another user.",
                why="It would hold the tokens with which your sessions are reached.",
                fix=fix,
            )
        if stat.S_IMODE(status.st_mode) != 0o700:
            os.fchmod(handle, 0o700)
    finally:
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def locked() -> Iterator[None]:
    """Keep all other processes from starting or taking a stack meanwhile."""
    with (folder() / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write(entry: Entry) -> None:
    """Write a stack's file, or a new version of it, in one move."""
    target = folder() / f"{entry.stack}.json"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    with replacing_file(target) as partial, open(os.open(partial, flags, 0o600), "w") as file:
        json.dump(asdict(entry), file)


def forget(stack: str) -> None:
    """Remove a stack's file, if it is there."""
    with contextlib.suppress(OSError, StackError):
        (folder() / f"{stack}.json").unlink(missing_ok=True)


def living() -> list[Entry]:
    """Stacks of this user on this machine whose head runs, the oldest first; drops other files."""
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


def since_boot() -> float:
    """Seconds since the machine has started; a clock that is set changes nothing of it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def new(stack: str, head: int, directory: Path, token: str, **what: Any) -> Entry:
    """Entry of a stack whose head was started just now."""
    return Entry(
        stack=stack,
        head=head,
        head_started=started(head) or "",
        host=socket.gethostname(),
        directory=str(directory),
        token=token,
        created=since_boot(),
        **what,
    )


PATIENCE = 10.0
"""Seconds in which a head takes its stack down."""
IDENTITY = "identity.json"


def terminate(entry: Entry) -> int:
    """End every process of a stack and remove its folder; returns how many there were."""
    members = _members(entry.stack, entry.head, entry.head_started)
    with contextlib.suppress(OSError, ValueError):
        connection = Connection(entry.folder)
        connection.ask("end")
        connection.close()
        psutil.wait_procs(members, timeout=PATIENCE)
    processes.end(_members(entry.stack, entry.head, entry.head_started))
    shutil.rmtree(entry.folder, ignore_errors=True)
    forget(entry.stack)
    return len(members)


def write_identity(entry: Entry) -> None:
    """Write into a stack's folder which process its head is."""
    text = json.dumps([entry.stack, entry.head, entry.head_started])
    (entry.folder / IDENTITY).write_text(text)


def find_orphans(folder: Path) -> list[psutil.Process]:
    """Processes that are left of the stack to which this folder belonged."""
    try:
        stack, head, head_started = read_json(folder / IDENTITY)
        return _members(str(stack), int(head), str(head_started))
    except (OSError, ValueError, TypeError, OverflowError):
        return []


def remove(folder: Path) -> int:
    """End a stack's orphans and remove its folder; returns how many processes there were."""
    members = find_orphans(folder)
    processes.end(members)
    shutil.rmtree(folder, ignore_errors=True)
    return len(members)


def _members(stack: str, head: int, head_started: str) -> list[psutil.Process]:
    # While a process of its session lives, the head's number is given to nobody else. Where
    # somebody has it, the session is gone, and only the mark tells.
    ours = started(head) in (None, head_started)
    return processes.of_stack(stack, head if ours else -1)
