"""A time limit for reward functions, which run in the notebook's own process.

In the main thread a timer ends even a wait for a network; in another thread, as under a dashboard,
the exception comes with the function's next line of Python. While a debugger is attached nothing
is ended: a person thinks longer than any function.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class RewardTimeoutError(Exception):
    """A reward function took longer than `reward.timeout`."""

    def __init__(self, seconds: float = 0.0) -> None:
        super().__init__(
            f"the reward function did not return within {seconds:g} s (reward.timeout)"
            if seconds
            else "the reward function did not return within reward.timeout"
        )


@dataclass(slots=True)
class Limit:
    """The time limit of this process, which has one session."""

    seconds: float | None = 60.0
    """Seconds for each sample, also of a function that takes all samples. None: no limit."""


LIMIT = Limit()


@contextmanager
def limited(samples: int = 1) -> Iterator[None]:
    """Raise RewardTimeoutError inside the block when its time is up."""
    if LIMIT.seconds is None:
        yield
    elif threading.current_thread() is threading.main_thread():
        yield from _by_timer(LIMIT.seconds * samples)
    else:
        yield from _by_thread(LIMIT.seconds * samples)


def _by_timer(seconds: float) -> Iterator[None]:
    def over(signum: int, frame: FrameType | None) -> None:
        if sys.gettrace() is None:
            raise RewardTimeoutError(seconds)

    before = signal.signal(signal.SIGALRM, over)
    try:  # an interrupt that comes now must not leave a timer that goes off later
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _by_thread(seconds: float) -> Iterator[None]:
    thread = ctypes.c_ulong(threading.get_ident())
    lock, done = threading.Lock(), False

    def over() -> None:
        with lock:
            if not done:
                raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
                raise_in(thread, ctypes.py_object(RewardTimeoutError))

    timer = threading.Timer(seconds, over)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            done = True
        timer.cancel()
