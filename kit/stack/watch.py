"""`Watch`: do the processes of a stack still live? Known by identity: number and time of birth.

    head      Ray's: without one of them, every use of Ray ends the notebook's kernel or hangs
    trainer   all ranks together: those that are left would wait for the others for ever
    engine i  the actor and SGLang's processes: none works without the others

The death of one may bring death to another: whoever is told of the second is told of the first.
A thread looks every `interval` seconds, and whoever is about to use a part looks then. A part of
which a process is gone is ended whole, so that a call that waits for it fails instead of waiting.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import psutil

from kit.stack import processes

HEAD, TRAINER = "head", "trainer"


def engine(index: int) -> str:
    """The name of an engine's part."""
    return f"engine {index}"


class Elsewhere(ABC):
    """A member that is no process of this machine."""

    @abstractmethod
    def lives(self) -> bool:
        """Look now."""

    @abstractmethod
    def end(self) -> None:
        """Have it ended; returns at once."""


Member = psutil.Process | Elsewhere | None


class Watch:
    """Which parts of a stack there are, and which have died."""

    def __init__(self, interval: float, on_death: Callable[[str], None]) -> None:
        """Looks from now on; `on_death` is called once a death, in whichever thread saw it."""
        self._parts: dict[str, list[Member]] = {}
        self._dead: set[str] = set()
        self._on_death, self._interval = on_death, interval
        self._lock = threading.RLock()
        self._ended = threading.Event()
        threading.Thread(target=self._work, name="kit-watch", daemon=True).start()

    def add(self, part: str, who: Iterable[int | Elsewhere]) -> None:
        """Look after these (process ids, or members elsewhere) from now on; they take the place of
        a part that has died.
        """
        members = [_found(one) if isinstance(one, int) else one for one in who]
        with self._lock:
            self._parts[part] = members
            self._dead.discard(part)

    def gone(self, part: str) -> None:
        """This one has died, and nobody knows its processes."""
        with self._lock:
            self._parts[part] = [None]

    def dead(self) -> set[str]:
        """Look now: the parts that have died and that nothing has taken the place of."""
        with self._lock:
            while self._look():
                pass  # again: what took this part along may have begun to end meanwhile
            return set(self._dead)

    def end(self, part: str) -> None:
        """End a part, and know it as dead."""
        with self._lock:
            if part in self._parts and part not in self._dead:
                self._bury(part)

    def _look(self) -> bool:
        """Bury what has died since: was there any?"""
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
        processes.end([one for one in members if isinstance(one, psutil.Process)])
        for one in members:
            if isinstance(one, Elsewhere):
                one.end()
        self._on_death(part)

    def close(self) -> None:
        """Look no more."""
        self._ended.set()
        with self._lock:
            self._parts.clear()

    def _work(self) -> None:
        while not self._ended.wait(self._interval):
            self.dead()


def _found(pid: int) -> psutil.Process | None:
    """None if it is gone already; the next look then ends its part."""
    try:
        return psutil.Process(pid)
    except psutil.NoSuchProcess:
        return None


def _lives(process: Member) -> bool:
    if isinstance(process, Elsewhere):
        return process.lives()
    return process is not None and processes.lives(process)
