"""Sessions that share a stack: what the stack keeps of each, and whose turn it is.

    Slot    one session's share: settings that may differ, and the numbers of its weights
    Slots   all of a stack
    Turns   a lock that sessions get in the order in which they ask for it

A stack works for one session at a time. What its processes hold of the others waits: the trainers
park what they train, and the engines get a session's weights when that needs them again.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from kit.config import SessionConfig
from kit.errors import StackError
from kit.messages import FIRST
from kit.stack.actors import StackSettings
from kit.stack.calls import LateError
from kit.utils.interrupts import held
from kit.weight_sync.transport import POLICY

PATIENCE = 0.5
"""Seconds for which an interrupt may wait while a thread waits for its turn."""


@dataclass(slots=True, eq=False)
class Slot:
    """One session's share of a stack. While it is that session's turn, the stack's parts have the
    present values.
    """

    name: str
    config: SessionConfig
    max_response_len: int
    loss: Callable[..., Any] | None = None
    """A loss function of the user's own."""
    version: int = 0
    """Which weights the trainers have for it."""
    engine_version: int = 0
    """Which weights it was that the engines last got for it."""
    exact: bool = False
    """Whether they got them without the disturbance."""
    needs_load: bool = False
    """Whether trainers were started again, and have read no checkpoint for it."""
    uncounted: int = 0
    """Updates that were made for it and that nobody has counted yet."""

    @property
    def adapter(self) -> str:
        """What engines call its adapter, where they have adapters beside their weights."""
        return f"{POLICY}.{self.name}" if self.name else POLICY


class TrainerNumbers(Protocol):
    """What trainers know of the weights of the session whose turn it is."""

    version: int
    needs_load: bool

    def settle(self) -> bool:
        """Wait for an update that nobody waited for; whether it was made."""


class EngineNumbers(Protocol):
    """What engines know of the weights of the session whose turn it is."""

    engine_version: int
    exact: bool


class Slots:
    """The sessions of a stack, whose turn it is, and whose weights the engines hold."""

    def __init__(self, settings: StackSettings) -> None:
        """Have one, for which the stack is started."""
        self._settings = settings
        config, longest = settings.config, settings.max_response_len
        self.first = self.present = Slot(FIRST, config, longest, settings.loss)
        self.all = [self.first]
        self.in_engines = {self.first}
        """Whose weights the engines hold: those of one session, or the adapters of several."""
        self.found: set[str] = set()
        """Names of those that trainers held for others, of a stack that was taken over."""
        self._turns = Turns()
        self._trainers: TrainerNumbers
        self._engines: EngineNumbers

    def connect(self, trainers: TrainerNumbers, engines: EngineNumbers) -> None:
        """Know the parts that have the numbers of whoever has its turn."""
        self._trainers, self._engines = trainers, engines

    def add(self, slot: Slot) -> None:
        """Have another one."""
        self.all.append(slot)

    def remove(self, slot: Slot) -> None:
        """Have one less, whose turn it is not."""
        self.in_engines.discard(slot)
        if slot in self.all:
            self.all.remove(slot)

    def find(self, names: set[str]) -> bool:
        """Note which ones trainers hold; whether there are any but the first."""
        self.found = names - {FIRST}
        if self.found:
            self.in_engines.clear()  # they may have anybody's
        return bool(self.found)

    @contextmanager
    def turn(self, slot: Slot, *, busy: bool) -> Iterator[Slot | None]:
        """Give a session its turn in the block; one inside another gives it back at its end.

        The value is whose turn it is around the block; None where it is no one's.

        Raises:
            StackError: the engines are `busy` with the session of the block around.
        """
        with self._turns.take() as inside:
            around = self.present
            if inside and busy and slot is not around:
                raise _writing(around, slot)
            self._give(slot)
            try:
                yield around if inside else None
            finally:
                if inside:
                    self._give(around)

    @contextmanager
    def give_way(self, *, busy: bool) -> Iterator[Slot | None]:
        """Let others have their turns in the block, if this thread has one; it has it again after.

        For waiting in the midst of a turn for somebody who may wait for a turn. The value is whose
        turn it is around the block; None where it is no one's.

        Raises:
            StackError: the engines are `busy` with the session whose turn it is.
        """
        if not self._turns.is_mine():
            yield None
            return
        around = self.present
        if busy:
            raise _writing(around, None)
        try:
            with self._turns.released():
                yield around
        finally:
            self._give(around)

    def _give(self, slot: Slot) -> None:
        """Have all parts work with the settings and numbers of a session."""
        mine, settings = self.present, self._settings
        trainers, engines = self._trainers, self._engines
        if slot is mine:
            return
        with held():
            try:
                mine.uncounted += trainers.settle()
            except LateError:
                raise
            except StackError:  # it made nothing; whether a trainer lives is looked at in each call
                pass
            mine.config = settings.config
            mine.version, mine.needs_load = trainers.version, trainers.needs_load
            mine.engine_version, mine.exact = engines.engine_version, engines.exact
            settings.config, settings.loss = slot.config, slot.loss
            settings.max_response_len = slot.max_response_len
            trainers.version, trainers.needs_load = slot.version, slot.needs_load
            engines.engine_version, engines.exact = slot.engine_version, slot.exact
            self.present = slot

    def versions(self, slot: Slot) -> tuple[int, int]:
        """Numbers of a session's weights: (those that engines last got, those of the trainers)."""
        if slot is self.present:
            return self._engines.engine_version, self._trainers.version
        return slot.engine_version, slot.version

    def needs_load(self, slot: Slot) -> bool:
        """Whether a session's weights have to be read from a checkpoint."""
        return self._trainers.needs_load if slot is self.present else slot.needs_load

    def settle(self, slot: Slot) -> int:
        """Wait for an update of a session that nobody waited for; how many it made since."""
        if slot is self.present:
            slot.uncounted += self._trainers.settle()
        made, slot.uncounted = slot.uncounted, 0
        return made


def _writing(around: Slot, other: Slot | None) -> StackError:
    """The error of a call for one session while the engines write for another."""
    whom = repr(other.config.name) if other else "Another session"
    return StackError(
        f"{whom} was asked for something while the engine writes for {around.config.name!r}.",
        why="Both share the engine, which works for one of them at a time. A reward function is "
        "called while other responses are still being written.",
        fix="take the steps by hand: rollout = session.generate(), and then "
        "session.score(rollout), in which other sessions can be called.",
    )


class Turns:
    """A lock whose holder may take it again, and that goes to whoever has waited longest.

    Without an order a loop that gives it back and takes it again would keep all others waiting.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: deque[object] = deque()
        self._owner: int | None = None

    @contextmanager
    def take(self) -> Iterator[bool]:
        """Hold the lock in the block; the value is whether this thread held it before."""
        if self.is_mine():
            yield True
            return
        try:
            self._acquire()
            yield False
        finally:
            if self.is_mine():
                self._release()

    def is_mine(self) -> bool:
        """Whether this thread holds the lock."""
        return self._owner == threading.get_ident()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let others have the lock in the block, which this thread holds before and after."""
        self._release()
        try:
            yield
        finally:
            with held():
                self._acquire()

    def _acquire(self) -> None:
        ticket = object()
        try:
            while not self._is_next(ticket):
                pass  # an interrupt is raised between two waits
        except BaseException:
            with held(), self._changed:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._changed.notify_all()
            raise

    def _is_next(self, ticket: object) -> bool:
        """Wait a little, and take the lock if it is this one's turn.

        An interrupt that came upon the condition itself would leave it taken for ever.
        """
        with held(), self._changed:
            if ticket not in self._waiting:
                self._waiting.append(ticket)
            self._changed.wait_for(lambda: self._may_go(ticket), PATIENCE)
            if self._may_go(ticket):
                self._waiting.popleft()
                self._owner = threading.get_ident()
                return True
        return False

    def _may_go(self, ticket: object) -> bool:
        return self._owner is None and self._waiting[0] is ticket

    def _release(self) -> None:
        with held(), self._changed:
            self._owner = None
            self._changed.notify_all()
