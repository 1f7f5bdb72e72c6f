"""Holds back Ctrl-C while something must not be interrupted.

    with held():                 an interrupt that comes in here is raised at the end
        update, counters
    with held(stop):             and `stop` is called at once, so that the end comes soon
    with collected():            one that a `held` inside has kept is raised at this end instead
    with raised_again():         one that Python drops, as it came upon a finalizer, is raised

A person who presses the button a third time is let through: what is held may have hung. Signals
reach the main thread only, so in any other thread none of this does anything.
"""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any

LET_THROUGH = 3
"""Which interrupt of a block is raised where it comes."""
_SOON_SECONDS = 0.02
"""After so long a finalizer has ended, and what it came upon goes on."""


@dataclass(slots=True)
class Interrupts:
    """Interrupts that arrived during a block."""

    count: int = 0
    said: str = ""
    """What the KeyboardInterrupt is to say of the state that the block has left."""


_blocks: list[Interrupts] = []
"""Blocks of the main thread that are at work, the outermost first."""


@contextmanager
def held(at_once: Callable[[], Any] | None = None) -> Iterator[Interrupts]:
    """Delay interrupts to the end of the block; an exception of the block replaces them.

    Args:
        at_once: called in the moment of each, in the main thread, wherever that is; and at the
            beginning, if one waits already.

    Raises:
        KeyboardInterrupt: at the end, if one came.
    """
    if not _can_hold():
        yield Interrupts()
        return
    block = Interrupts()

    def note(signum: int, frame: FrameType | None) -> None:
        block.count += 1
        if at_once:
            at_once()
        if block.count >= LET_THROUGH:
            raise KeyboardInterrupt("let through, as it was the third one")

    around, before = len(_blocks), signal.signal(signal.SIGINT, note)
    try:
        if at_once and any(outer.count for outer in _blocks):
            at_once()
        _blocks.append(block)
        yield block
    finally:
        del _blocks[around:]
        signal.signal(signal.SIGINT, before)
    _pass_on(block)


@contextmanager
def collected() -> Iterator[None]:
    """Delay interrupts that an inner `held` would raise to the end of this block.

    Any other interrupt is raised where it comes.
    """
    if not _can_hold():
        yield
        return
    around, block = len(_blocks), Interrupts()
    try:
        _blocks.append(block)
        yield
    finally:
        del _blocks[around:]
    _pass_on(block)


@contextmanager
def raised_again() -> Iterator[None]:
    """Raise an interrupt again that came upon a finalizer, a moment later or at the block's end.

    Python prints what a `__del__` or a callback of a weak reference raises, and goes on. Ray's
    streams of answers have such a `__del__`, so a key pressed in that moment would do nothing.

    Raises:
        KeyboardInterrupt: at the end, if one has not been raised again by then.
    """
    if not _can_hold():
        yield
        return
    dropped: list[object] = []
    before = sys.unraisablehook

    def note(unraisable: Any) -> None:
        if not issubclass(unraisable.exc_type, KeyboardInterrupt):
            before(unraisable)
            return
        dropped.append(unraisable.exc_type)
        # From here it would be raised in this hook, and be dropped once more.
        _thread.start_new_thread(_raise_soon, (dropped, threading.get_ident()))

    sys.unraisablehook = note
    try:
        yield
    finally:
        if sys.unraisablehook is note:
            sys.unraisablehook = before
        missing, dropped[:] = bool(dropped), []
    if missing:
        raise KeyboardInterrupt


def _raise_soon(dropped: list[object], thread: int) -> None:
    time.sleep(_SOON_SECONDS)
    with suppress(IndexError):  # the block has ended
        dropped.pop()
        signal.pthread_kill(thread, signal.SIGINT)


def _can_hold() -> bool:
    """Whether interrupts raise KeyboardInterrupt here, and so can be delayed."""
    main = threading.current_thread() is threading.main_thread()
    return main and callable(signal.getsignal(signal.SIGINT))


def _pass_on(block: Interrupts) -> None:
    if not block.count:
        return
    if _blocks:
        _blocks[-1].count += block.count
        _blocks[-1].said = block.said or _blocks[-1].said
    else:
        raise KeyboardInterrupt(*([block.said] if block.said else []))
