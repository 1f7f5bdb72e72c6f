"""Holds back Ctrl-C while something must not be interrupted.

    with held():                 an interrupt that comes in here is raised at the end
        update, counters
    with held(stop):             and `stop` is called at once, so that the end comes soon
    with collected():            one that a `held` inside has kept is raised at this end instead

A person who presses the button a third time is let through: what is held may have hung. Signals
reach the main thread only, so in any other thread none of this does anything.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

LET_THROUGH = 3
"""Which interrupt of a block is raised where it comes."""


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
