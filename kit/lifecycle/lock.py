"""`SessionLock`: a session does one thing at a time, whichever thread asks for it.

    cell     ── verb ──►┐
                        ├── one lock ──► session ──►┐
    training ── step ──►┘                           ├── its turn ──► stack
    a fork's cells and training ──► fork ──────────►┘

While training runs, a verb of another thread is refused at once rather than kept waiting for an
end that may be hours away, and rather than slipped in between two steps, where it would draw
prompts and randomness that the training was going to draw. Once a pause was asked for, a verb
waits for the step under way and then has the session to itself: a training that is resumed
meanwhile waits for the verb.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Protocol, TypeVar

from kit.errors import SessionError
from kit.utils.files import in_living_folder
from kit.utils.interrupts import held, raised_again

if TYPE_CHECKING:
    from kit.lifecycle.start import SessionParts
    from kit.lifecycle.train_loop import Training


PATIENCE = 0.5
"""Seconds for which an interrupt may wait while a thread waits for the lock."""

P = ParamSpec("P")
Result = TypeVar("Result")


class SessionLock:
    """One session's lock, and the training that runs in a thread of its own."""

    def __init__(self, give_way: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """`give_way` lets other sessions work while a thread waits for this one's lock.

        Without it two threads could wait for each other: one for the other session's lock in the
        midst of a turn on the stack, the other, which has that lock, for its turn.
        """
        self._give_way = give_way
        self.training: Training | None = None
        """The last one that was made to run in a thread."""
        self.in_step = False
        """Whether a whole step is under way; where the session is, is noted at its end."""
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def take(self, verb: str) -> Iterator[None]:
        """Hold the session for a verb and the verbs that it calls.

        Raises:
            SessionError: a training runs in another thread.
        """
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        self._refuse_while_training(verb)
        got = False
        try:
            with held():  # an interrupt just after it was taken would leave it taken for ever
                got = self._lock.acquire(blocking=False)
            if not got:
                with self._give_way():
                    while not got:
                        with held():
                            got = self._lock.acquire(timeout=PATIENCE)
            self._refuse_while_training(verb)  # it may have been resumed in the meantime
            self._owner = me
            with raised_again():
                yield
        finally:
            if got:
                self._owner = None
                self._lock.release()

    def _refuse_while_training(self, verb: str) -> None:
        training = self.training
        if training is None or not training.goes_on or training.is_in_this_thread:
            return
        raise SessionError(
            f"{verb} was called while training runs: {training.done} of {training.total} steps "
            "are done.",
            why="A session does one thing at a time.",
            fix="pause first, with the dashboard's button or `session.training.pause()`, and call "
            "it again; or end the training: `session.training.stop()`.",
        )


class HasParts(Protocol):
    """Protocol of a class whose methods are verbs: `RLSession`."""

    _parts: SessionParts


Self_ = TypeVar("Self_", bound=HasParts)


def verb(
    method: Callable[Concatenate[Self_, P], Result],
) -> Callable[Concatenate[Self_, P], Result]:
    """Make a method a verb: it holds the session's lock, and the journal is written after it."""

    @functools.wraps(method)
    def in_turn(self: Self_, /, *args: P.args, **kwargs: P.kwargs) -> Result:
        __tracebackhide__ = True  # IPython then shows the verb's own lines
        parts, lock = self._parts, self._parts.lock
        parts.refuse_in_fork()  # before the lock, which may have been taken as it was forked
        with lock.take(method.__name__), parts.turn():
            outermost = not lock.in_step
            lock.in_step = not outermost or method.__name__ == "step"
            try:
                with in_living_folder():
                    return method(self, *args, **kwargs)
            finally:
                if outermost:
                    lock.in_step = False
                    with held():  # or what was done would be neither written down nor returned
                        parts.note()

    return in_turn
