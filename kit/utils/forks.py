"""Forked children: what a process has set up for its own end is not theirs to do.

A child that `os.fork` makes, as `multiprocessing` does on Linux, inherits handlers of exit and open
sockets, but none of the threads.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any


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


def end_with_cell() -> None:
    """Have a child that a notebook's cell forks end with that cell, as it would with a script.

    IPython catches `sys.exit`, and every other error: the child would go on as a second kernel,
    which reads what is sent to the first, and a parent that waits for it would wait for ever.
    """
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython else None
    if shell is not None:
        _kernels.add(os.getpid())
        shell.events.register("post_run_cell", _end_child)  # once, however often it is asked for


_kernels: set[int] = set()


def _end_child(result: Any) -> None:
    if os.getpid() in _kernels:
        return
    error = result.error_before_exec or result.error_in_exec
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    with suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


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
