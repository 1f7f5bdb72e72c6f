"""The processes of a stack, identified by process session and a mark, and the watchdog over them.

`Watch` looks whether they still live; it knows them by number and time of birth.

    head      Ray's: without one of them, every use of Ray ends the notebook's kernel or hangs
    trainer   all ranks together: those that are left would wait for the others for ever
    engine i  the actor and SGLang's processes: none works without the others

The death of one may bring death to another: whoever is told of the second is told of the first.
A thread looks every `interval` seconds, and whoever is about to use a part looks then. A part of
which a process is gone is ended whole, so that a call that waits for it fails instead of waiting.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from weakref import WeakKeyDictionary

import psutil

SHARED_MEMORY = "/dev/shm/"
TRACKER_SECONDS = 3.0
"""How long Python's resource trackers get to remove what the others have left."""
FLAGS, EXITING, BEGUN = 5, 0x4, 18
"""In /proc/PID/stat, fields after the state: flags, with the kernel's PF_EXITING, and when the
process began."""
_BEGUN: WeakKeyDictionary[psutil.Process, str] = WeakKeyDictionary()
"""When each process that is asked after began, which tells it from a later one with its id."""
MARK = "KIT_STACK"
"""Environment variable that every process of a stack inherits; its value names the stack."""
CORES_VARIABLE = "KIT_CORES"
"""Environment variable: how many cores a session may keep busy, where it shares the machine."""


def cores() -> int:
    """Number of cores that this process may use, less those it was told to leave to others."""
    told = os.environ.get(CORES_VARIABLE, "")
    return int(told) if told.isdigit() and int(told) else len(os.sched_getaffinity(0))


def lives(process: psutil.Process) -> bool:
    """Whether a process is alive; false as soon as it begins to end."""
    try:
        if process not in _BEGUN and not process.is_running():
            return False
        with open(f"/proc/{process.pid}/stat", encoding="utf-8", errors="replace") as file:
            state, *fields = file.read().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError, psutil.NoSuchProcess):
        return False
    if _BEGUN.setdefault(process, fields[BEGUN]) != fields[BEGUN]:
        return False
    return state not in "ZX" and not int(fields[FLAGS]) & EXITING


def of_stack(stack: str, head: int) -> list[psutil.Process]:
    """All living processes of a stack, except the caller.

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
    """Bytes of memory of processes, without files and shared memory.

    A page that forks share counts once: each has its part of it.
    """
    total = 0
    for process in processes:
        try:
            rows = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="utf-8")
            total += 1024 * int(re.findall(r"^Pss_Anon: +(\d+) kB", rows, re.MULTILINE)[0])
        except (OSError, IndexError):  # it has ended, or the kernel is older than Linux 5.4
            with contextlib.suppress(psutil.Error):
                memory = process.memory_info()
                total += max(memory.rss - memory.shared, 0)
    return total


def end(processes: list[psutil.Process]) -> None:
    """Kill processes, wait until they are gone, and remove their shared memory and semaphores."""
    shared = [f for p in processes for f in (*segments(p.pid), *semaphores(p.pid))]
    trackers = [process for process in processes if _is_tracker(process)]
    others = [process for process in processes if process not in trackers]
    _kill(others)
    _, left = psutil.wait_procs(trackers, timeout=TRACKER_SECONDS)
    _kill(left)
    for file in shared:
        with contextlib.suppress(OSError):
            os.unlink(file)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


def take_names_away(pid: int) -> None:
    """Unlink a process's shared memory, which is freed when the last process closes it."""
    for file in segments(pid):
        with contextlib.suppress(OSError):
            os.unlink(file)


def end_with(pids: list[int]) -> None:
    """End this process when one of these is gone."""
    files = [os.pidfd_open(pid) for pid in pids if pid != os.getpid()]

    def wait() -> None:
        select.select(files, [], [])
        os._exit(1)

    threading.Thread(target=wait, name="kit-parts", daemon=True).start()


def segments(pid: int) -> list[str]:
    """Shared memory files that a process has open and that still have a name."""
    found = []
    with contextlib.suppress(OSError):
        for number in os.listdir(folder := f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                file = os.readlink(f"{folder}/{number}")
                if file.startswith(SHARED_MEMORY) and not file.endswith(" (deleted)"):
                    found.append(file)
    return found


def semaphores(pid: int) -> list[str]:
    """Files of the named semaphores of a process that still have their name.

    The C library makes one under another name, which is the one that the kernel tells; so they are
    known by their number. Python's resource tracker removes them, unless it is killed or too late.
    """
    numbers = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", errors="replace") as lines:
        for line in lines:
            fields = line.split(maxsplit=5)
            if len(fields) > 5 and fields[5].startswith(f"{SHARED_MEMORY}sem."):
                numbers.add(int(fields[4]))
    if not numbers:
        return []
    return [file.path for file in os.scandir(SHARED_MEMORY) if file.inode() in numbers]


def unowned_loads() -> list[Path]:
    """Files in shared memory, of this user, in which SGLang told how busy an engine was that lives
    no more: no process has them open.
    """
    files = {path for path in Path(SHARED_MEMORY).glob("sglang_loads_*.shm") if _is_own(path)}
    if not files:
        return []
    for pid in psutil.pids():  # later than the list: who makes one has it open from that moment
        files -= {Path(file) for file in segments(pid)}
    return sorted(files)


def _is_own(path: Path) -> bool:
    with contextlib.suppress(OSError):
        found = path.lstat()
        return stat.S_ISREG(found.st_mode) and found.st_uid == os.getuid()
    return False


def _is_tracker(process: psutil.Process) -> bool:
    """Whether a process is Python's resource tracker, which removes unused named semaphores."""
    with contextlib.suppress(psutil.Error):
        return any("multiprocessing.resource_tracker" in word for word in process.cmdline())
    return False


HEAD, TRAINER = "head", "trainer"


def engine(index: int) -> str:
    """Name of an engine's part."""
    return f"engine {index}"


class Elsewhere(ABC):
    """Member of a part that is not a process of this machine."""

    @abstractmethod
    def lives(self) -> bool:
        """Check now whether it is alive."""

    @abstractmethod
    def end(self) -> None:
        """Ask for its end; returns at once."""


Member = psutil.Process | Elsewhere | None


class Watch:
    """Watchdog: the parts of a stack, and which have died."""

    def __init__(self, interval: float, on_death: Callable[[str], None]) -> None:
        """Start watching; `on_death` is called once per death, in the thread that saw it."""
        self._parts: dict[str, list[Member]] = {}
        self._dead: set[str] = set()
        self._on_death, self._interval = on_death, interval
        self._lock = threading.RLock()
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="kit-watch", daemon=True).start()

    def add(self, part: str, who: Iterable[int | Elsewhere]) -> None:
        """Watch these (process ids, or members elsewhere) as a part, in place of one that died."""
        members = [_found(one) if isinstance(one, int) else one for one in who]
        with self._lock:
            self._parts[part] = members
            self._dead.discard(part)

    def members(self, part: str) -> list[psutil.Process]:
        """Processes of a part on this machine, as far as they were found."""
        with self._lock:
            return [one for one in self._parts[part] if isinstance(one, psutil.Process)]

    def gone(self, part: str) -> None:
        """Mark a part as dead whose processes are unknown."""
        with self._lock:
            self._parts[part] = [None]

    def dead(self) -> set[str]:
        """Check now; returns parts that have died and were not replaced."""
        with self._lock:
            while self._look():
                pass  # again: what took this part along may have begun to end meanwhile
            return set(self._dead)

    def end(self, part: str) -> None:
        """End a part and mark it as dead."""
        with self._lock:
            if part in self._parts and part not in self._dead:
                self._bury(part)

    def _look(self) -> bool:
        """Handle processes that have died since the last look; returns whether any have."""
        found = [
            part
            for part, members in self._parts.items()
            if part not in self._dead and not all(map(_lives, members))
        ]
        for part in found:
            self._bury(part)
        return bool(found)

    def _bury(self, part: str) -> None:
        self._dead.add(part)
        members = self._parts[part]
        end([one for one in members if isinstance(one, psutil.Process)])
        for one in members:
            if isinstance(one, Elsewhere):
                one.end()
        self._on_death(part)

    def close(self) -> None:
        """Stop watching."""
        self._ended.set()
        with self._lock:
            self._parts.clear()

    def _work(self) -> None:
        while not self._ended.wait(self._interval):
            self.dead()


def _found(pid: int) -> psutil.Process | None:
    """Handle of a process; None if it has ended already."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _lives(process: Member) -> bool:
    if isinstance(process, Elsewhere):
        return process.lives()
    return process is not None and lives(process)
