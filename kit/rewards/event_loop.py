"""An event loop for async reward functions, in a thread of its own.

The notebook's own loop is busy running the cell. A call that blocks this loop, by waiting without
`await`, keeps all others waiting, and no timer of asyncio can end it: see `EventLoop.blocked_in`.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Awaitable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kit.rewards.timeouts import (
    GRACE_SECONDS,
    INTERRUPTS,
    Outcome,
    RewardTimeoutError,
    ThreadUse,
    end_in_thread,
    names_threads,
    noting_signals,
)

T = TypeVar("T")

_LAST_WORDS_SECONDS = 5.0
"""How long an interrupted async reward may take to clean up."""


class CarriedInterruptError(Exception):
    """An interrupt on its way out of a task; asyncio lets a bare one fall through its loop."""

    def __init__(self, interrupt: BaseException) -> None:
        self.interrupt = interrupt


class CarriedExitError(Exception):
    """A function's `sys.exit` on its way out of a task, through which it would end the loop."""

    def __init__(self, exit: SystemExit) -> None:
        self.exit = exit


class EventLoop:
    """An event loop in a thread, until `close`."""

    def __init__(self) -> None:
        self.use = ThreadUse()
        """Whether code in it set signals, which needs a main thread."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="kit-reward", daemon=True)
        self._thread.start()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine beside the others, with the caller's context variables."""
        return asyncio.run_coroutine_threadsafe(guarded(coroutine), self._loop)

    def blocked_in(self) -> asyncio.Task[Any] | None:
        """The task whose Python or C code runs at this moment, and lets no other run."""
        return asyncio.current_task(self._loop)

    def close(self, seconds: float = _LAST_WORDS_SECONDS) -> bool:
        """Cancel what still runs, allow it some time to clean up; returns whether it has ended.

        A thread that does not end when it is told to is left behind.
        """
        self._loop.call_soon_threadsafe(self._loop.stop)
        return self._ended(seconds) or end_in_thread(self._thread, self._ended)

    def _ended(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _work(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            with noting_signals(self.use):
                loop.run_forever()
                unfinished = asyncio.all_tasks(loop)
                for task in unfinished:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*unfinished, return_exceptions=True))
                loop.run_until_complete(loop.shutdown_asyncgens())
                loop.close()
        except RewardTimeoutError:  # from `close`, after the function had returned
            return


async def guarded(awaitable: Awaitable[T]) -> T:
    """Await, and carry an interrupt to `result` instead of into the loop."""
    try:
        return await awaitable
    except INTERRUPTS as interrupt:
        raise CarriedInterruptError(interrupt) from None
    except SystemExit as error:
        raise CarriedExitError(error) from None


def result(call: Future[T], seconds: float | None = None) -> T:
    """The result of a call, in time. Raises its exception, or its interrupt."""
    try:
        return call.result(seconds)
    except CarriedInterruptError as error:
        raise error.interrupt from None
    except CarriedExitError as error:
        raise error.exit from None


def run_in_time(coroutine: Coroutine[Any, Any, Any], seconds: float | None) -> Outcome:
    """Run a coroutine to its end, in a loop of its own, or end it when its time is up."""
    begin = time.monotonic()
    loop = EventLoop()
    call = loop.begin(coroutine)
    value: Any = None
    exception: BaseException | None = None
    ended = False
    try:
        value = result(call, seconds)
    except INTERRUPTS:
        raise
    except BaseException as error:
        late = isinstance(error, TimeoutError) and time.monotonic() - begin >= (seconds or math.inf)
        exception = RewardTimeoutError(seconds or 0.0) if late else error
    finally:
        ended = loop.close(GRACE_SECONDS)
    passed = time.monotonic() - begin
    if isinstance(exception, RewardTimeoutError):
        return Outcome(None, exception, passed, "" if ended else "stuck")
    misfit = loop.use.needs_main or names_threads(exception)
    return Outcome(value, exception, passed, "thread" if misfit else "")
