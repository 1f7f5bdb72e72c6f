"""Forked children: what a process has set up for its own end is not theirs to do.

A child that `os.fork` makes, as `multiprocessing` does on Linux, inherits handlers of exit and open
sockets, but none of the threads.
"""

from __future__ import annotations

import atexit
import ctypes
import os
from collections.abc import Callable
from contextlib import suppress


def at_exit(function: Callable[[], object]) -> Callable[[], None]:
    """Call a function when this process ends, and in no child that it forks.

    Returns:
        What `atexit.unregister` takes.
    """
    owner = os.getpid()

    def in_owner() -> None:
        if os.getpid() == owner:
            function()

    atexit.register(in_owner)
    return in_owner


def never_release(*objects: object) -> None:
    """Keep objects, and what they refer to, from being released: not even as the process ends."""
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


def exit_without_destructors() -> None:
    """Have this process end right after Python has, without the destructors of libraries in C++.

    Those of a forked child would wait for threads that only its parent has, or crash.
    """
    library = ctypes.CDLL(None)
    with suppress(AttributeError):  # another C library than glibc has no `on_exit`
        library.on_exit(library["_exit"], None)
