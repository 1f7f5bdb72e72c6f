"""Ctrl-C at a moment of choice, and what a session is then."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any

from kit import RLSession


def interrupted(work: Callable[[], Any], after: float, again: float | None = None) -> bool:
    """Press Ctrl-C so many seconds after the work has begun, and again; was it interrupted?"""
    main = threading.get_ident()
    presses = [
        threading.Timer(seconds, signal.pthread_kill, (main, signal.SIGINT))
        for seconds in (after, *([] if again is None else [after + again]))
    ]

    def run() -> None:
        try:
            for press in presses:
                press.start()
            work()
        finally:
            for press in presses:
                press.cancel()
                if press.ident is not None:  # an interrupt may come before it was started
                    press.join()

    came = False
    try:
        run()
    except KeyboardInterrupt:
        came = True
    for press in presses:  # the second one may have come in the midst of ending the first
        while True:
            try:
                press.join()
                break
            except KeyboardInterrupt:
                came = True
            except RuntimeError:  # it was never started
                break
    return came


def digests(session: RLSession) -> list[str]:
    """Weights, optimizer and counters of each trainer, as one word each."""
    stack = session.debug.stack
    return stack.trainers.ask("probe", "digest")
