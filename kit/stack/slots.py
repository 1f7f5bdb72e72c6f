"""Sessions that share a stack: what the stack keeps of each, and whose turn it is.

    Slot    one session's share: settings that may differ, and the numbers of its weights
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
from typing import Any

from kit.config import SessionConfig


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
        me = threading.get_ident()
        if self._owner == me:
            yield True
            return
        ticket = object()
        with self._changed:
            self._waiting.append(ticket)
            try:
                while self._owner is not None or self._waiting[0] is not ticket:
                    self._changed.wait(1.0)  # without an end, an interrupt may not be seen
                self._owner = me
            finally:
                self._waiting.remove(ticket)
                self._changed.notify_all()
        try:
            yield False
        finally:
            with self._changed:
                self._owner = None
                self._changed.notify_all()
