"""Time limits of reward functions, which run in the notebook's own process.

    main thread    The function runs in place. When its time is up, a timer of the kit's own sends a
                   signal, again and again, which raises RewardTimeoutError: in waits, in loops,
                   in regular expressions, and in retries that swallow what is raised.
    other thread   As under a dashboard. It runs in a helper thread, in which the same is raised.
                   One that does not listen is left behind.

Some functions cannot be limited in place. Code in C may look at no signals; and what sets signals
itself, as math-verify does, works in a main thread only. `Outcome.misfit` names these two, and
`function_process.py` then runs them in a process that can be killed. While a debugger is attached
nothing is ended: a person thinks longer than any function. Nor is an import, which would leave half
a library behind: where one was under way as the time was up, all of it begins anew after its end.
"""

from __future__ import annotations

import bdb
import contextvars
import ctypes
import functools
import inspect
import math
import os
import re
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from queue import SimpleQueue
from types import FrameType
from typing import Any, Literal

SIGNAL = signal.SIGRTMIN + 7
"""Ends a call in the main thread; not SIGALRM, whose timer graders set and clear themselves."""
GRACE_SECONDS = 2.0
"""A function that still runs so long after it was told to end is taken for one that cannot be."""
_AGAIN_SECONDS = 0.25
_OFTEN = 4
"""So often a function may swallow what ends it; then the next line of its loop raises as well."""
_IMPORT_SECONDS = 300.0
"""So long after its time a function may still be importing."""
_IMPORTS = re.compile(r"importlib\._bootstrap$")
_DEBUGGERS = re.compile(r"(bdb|pdb|_?pydevd.*|debugpy.*)$")
_OF_THREADS = re.compile(r"\bthread", re.IGNORECASE)

INTERRUPTS = (KeyboardInterrupt, bdb.BdbQuit)
"""What is no failure of a function: somebody at the keyboard wants an end."""

Misfit = Literal["", "stuck", "thread"]
"""Why a function cannot stay: it did not end when told to, or it needs a main thread."""


class RewardTimeoutError(BaseException):
    """A reward function took longer than `reward.timeout`.

    No Exception: a function's `except Exception`, around a call that hangs, would take it for a
    failed try, and return 0.
    """

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """Outcome of a call: its value or its exception, and its seconds."""

    value: Any = None
    exception: BaseException | None = None
    """What the function raised, such as SystemExit, or RewardTimeoutError."""
    seconds: float | None = None
    misfit: Misfit = ""


def call_in_time(function: Callable[..., Any], argument: Any, seconds: float | None) -> Outcome:
    """Call a function with one argument, and end it when its time is up.

    A function that returns a value after that has failed all the same. Raises what is no failure
    of the function: an interrupt, and the end of a debugger.
    """
    if threading.current_thread() is threading.main_thread():
        return _call_in_place(function, argument, seconds)
    return _call_beside(function, argument, seconds)


# ---- in the main thread ------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Call:
    """A call in the main thread, and when it is told to end, in seconds of the monotonic clock."""

    seconds: float
    due: float
    frame: FrameType | None
    """Of `_call_in_place`; the function's own frames are below it."""
    told: int = 0
    excused: bool = False
    """Whether a debugger was attached when its time was up."""
    done: bool = False
    imports: float = 0.0
    """Seconds that it was given for imports."""
    imported: bool = False
    """Whether it was importing when it was last looked at; its time has not begun anew yet."""


class _Event(ctypes.Structure):
    """Linux's `struct sigevent`: which signal a timer sends, and to which thread."""

    _fields_ = (
        ("value", ctypes.c_void_p),
        ("signal", ctypes.c_int),
        ("notify", ctypes.c_int),
        ("thread", ctypes.c_int),
        ("padding", ctypes.c_int * 11),
    )


class _Times(ctypes.Structure):
    """Linux's `struct itimerspec`: when a timer sends, and every so often afterwards."""

    _fields_ = tuple(
        (name, ctypes.c_long)
        for name in ("again_seconds", "again_nanoseconds", "seconds", "nanoseconds")
    )


class _Timer:
    """A timer of the kernel's. A thread of Python would wait for code in C that has the GIL."""

    def __init__(self) -> None:
        self._calls: list[_Call] = []
        self.on_import: Callable[[], None] = lambda: None
        """Called where the time of a function begins anew, as it imports something."""
        self._timer = ctypes.c_void_p()
        self._owner = 0

    def begin(self, call: _Call) -> None:
        self._calls.append(call)
        self._set_first()

    def end(self, call: _Call) -> None:
        if call in self._calls:  # or it was interrupted before it began
            self._calls.remove(call)
        self._set_first()

    def _set_first(self) -> None:
        self._set(min((call.due for call in self._calls), default=math.inf))

    def _set(self, due: float) -> None:
        if due == math.inf and not self._owner:
            return
        if self._owner != os.getpid():
            self._make()
        left = 0.0 if due == math.inf else max(due - time.monotonic(), 1e-6)
        whole = int(left)
        again = int(_AGAIN_SECONDS * 1e9)
        times = _Times(0, again, whole, int((left - whole) * 1e9))
        _library().timer_settime(self._timer, 0, ctypes.byref(times), None)

    def _make(self) -> None:
        signal.signal(SIGNAL, self._end_call)
        to_thread = _Event(None, SIGNAL, 4, threading.main_thread().native_id or 0)  # THREAD_ID
        clock = time.CLOCK_MONOTONIC
        if _library().timer_create(clock, ctypes.byref(to_thread), ctypes.byref(self._timer)):
            raise OSError(ctypes.get_errno(), "timer_create failed")
        self._owner = os.getpid()

    def _end_call(self, _: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        for call in reversed(self._calls):
            if now >= call.due and not call.done and not call.excused:
                if sys.gettrace() is not None or _runs(_DEBUGGERS, frame, call.frame):
                    call.excused = True
                    return
                if call.imports < _IMPORT_SECONDS and (
                    call.imported or _runs(_IMPORTS, frame, call.frame)
                ):
                    self._give_time(call, now, _runs(_IMPORTS, frame, call.frame))
                    return
                call.told += 1
                error = RewardTimeoutError(call.seconds)
                if call.told > _OFTEN:
                    _raise_in_next_line(frame, call.frame, call.told - _OFTEN)
                raise error

    def _give_time(self, call: _Call, now: float, imports: bool) -> None:
        """Look at an import again soon; after its end, give the whole time."""
        seconds = min(call.seconds, _AGAIN_SECONDS) if imports else call.seconds
        call.imported = imports
        call.imports += seconds
        call.due = now + seconds
        self._set(call.due)
        self.on_import()


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL("librt.so.1", use_errno=True)


TIMER = _Timer()
"""The one of this process."""


def _call_in_place(function: Callable[..., Any], argument: Any, seconds: float | None) -> Outcome:
    begin = time.perf_counter()
    due = time.monotonic() + seconds if seconds else math.inf
    call = _Call(seconds or 0.0, due, inspect.currentframe())
    value, exception = None, None
    try:
        TIMER.begin(call)
        try:
            value = function(argument)
        finally:
            call.done = True
            if call.told > _OFTEN:
                sys.settrace(None)
    except INTERRUPTS:
        raise
    except BaseException as error:
        exception = error
    finally:
        call.done = True
        TIMER.end(call)
    passed, late = time.perf_counter() - begin, time.monotonic() - call.due
    if late < 0 or call.excused:
        return Outcome(value, exception, passed)
    if not isinstance(exception, RewardTimeoutError):
        exception = RewardTimeoutError(call.seconds)
    return Outcome(None, exception, passed, "stuck" if late > GRACE_SECONDS else "")


def _raise_in_next_line(frame: FrameType | None, last: FrameType | None, depth: int) -> None:
    """Have the next line of some frames raise too: that of an `except:` which swallows the first.

    Args:
        frame: what was interrupted.
        last: the frame below which the function runs.
        depth: how many frames below it; only those, as cleaning up in others would use it up.
    """

    def raise_in_line(_: FrameType, event: str, __: Any) -> Any:
        if event == "line":
            raise RewardTimeoutError  # which also ends the tracing
        return raise_in_line

    frames = []
    while frame is not None and frame is not last:
        frames.append(frame)
        frame = frame.f_back
    chosen = frames[-((depth - 1) % len(frames) + 1) :]
    for one in frames:
        one.f_trace = raise_in_line if one in chosen else None
    sys.settrace(lambda *_: None)


def _runs(modules: re.Pattern[str], frame: FrameType | None, last: FrameType | None) -> bool:
    """Whether code of such modules is being run, in this frame or one that it was called from."""
    while frame is not None and frame is not last:
        if modules.match(frame.f_globals.get("__name__") or ""):
            return True
        frame = frame.f_back
    return False


# ---- in another thread -------------------------------------------------------------------------


@dataclass(slots=True)
class ThreadUse:
    """Whether code in a thread asked for what works in a main thread only."""

    needs_main: bool = False


_thread = threading.local()
"""Of this thread: `use`, its ThreadUse, and `helper`, where its functions run."""


@contextmanager
def noting_signals(use: ThreadUse) -> Iterator[None]:
    """Note in `use` that code in this thread sets signals, which Python refuses in it.

    The function may swallow that refusal, and return 0 for a sample that it never graded.
    """
    _note_signals()
    before, _thread.use = getattr(_thread, "use", None), use
    try:
        yield
    finally:
        _thread.use = before


@functools.cache
def _note_signals() -> None:
    set_signal = signal.signal

    @functools.wraps(set_signal)
    def noting(*arguments: Any) -> Any:
        use: ThreadUse | None = getattr(_thread, "use", None)
        if use is not None:
            use.needs_main = True
        return set_signal(*arguments)

    signal.signal = noting  # type: ignore[assignment]


@dataclass(slots=True, eq=False)
class _Job(ThreadUse):
    """A call for a helper thread, and what came of it."""

    function: Callable[..., Any] = print
    argument: Any = None
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    value: Any = None
    exception: BaseException | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            with noting_signals(self):
                self.value = self.context.run(self.function, self.argument)
        except BaseException as error:
            self.exception = error
        finally:
            self.finished.set()


class _Helper:
    """A thread for the reward functions that one other thread calls."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(
            target=_serve, args=(self._jobs,), name="kit-reward", daemon=True
        )
        self._thread.start()
        self.dismiss = weakref.finalize(self, self._jobs.put, None)
        """Let the thread end, once it can."""

    def begin(self, job: _Job) -> None:
        self._jobs.put(job)

    def end(self, job: _Job) -> bool:
        return end_in_thread(self._thread, job.finished.wait)

    def runs(self, modules: re.Pattern[str]) -> bool:
        return _runs(modules, sys._current_frames().get(self._thread.ident or 0), None)


def _serve(jobs: SimpleQueue[_Job | None]) -> None:
    with suppress(RewardTimeoutError):  # one that came after the end of the function
        while (job := jobs.get()) is not None:
            job.run()


def end_in_thread(thread: threading.Thread, ended: Callable[[float], bool]) -> bool:
    """Have a thread's next lines of Python raise RewardTimeoutError; returns whether that helped.

    Args:
        thread: where something has to end.
        ended: waits for so many seconds, and returns whether it has.
    """
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    number = ctypes.c_ulong(thread.ident or 0)
    until = time.monotonic() + GRACE_SECONDS
    while time.monotonic() < until:
        raise_in(number, ctypes.py_object(RewardTimeoutError))
        if ended(_AGAIN_SECONDS):
            return True
    # What never arrives must not stay: all threads would look for it at every step, and one with a
    # debugger do nothing else. Only its arrival somewhere tells Python 3.11 that none is waiting.
    raise_in(number, None)
    with suppress(RewardTimeoutError):
        raise_in(ctypes.c_ulong(threading.get_ident()), ctypes.py_object(RewardTimeoutError))
        while True:
            pass
    return False


def _call_beside(function: Callable[..., Any], argument: Any, seconds: float | None) -> Outcome:
    begin = time.perf_counter()
    helper: _Helper = getattr(_thread, "helper", None) or _Helper()
    _thread.helper = None
    job = _Job(function=function, argument=argument)
    helper.begin(job)
    late = not job.finished.wait(seconds)
    given, imported = 0.0, False
    while late and seconds and given < _IMPORT_SECONDS:
        imports = helper.runs(_IMPORTS)
        if not imports and not imported:
            break
        more = min(seconds, _AGAIN_SECONDS) if imports else seconds
        given, imported = given + more, imports
        late = not job.finished.wait(more)
    if late and not helper.runs(_DEBUGGERS):
        helper.end(job)
        helper.dismiss()  # what ends calls may still be on its way to the thread
    else:
        late = False
        job.finished.wait()
        _thread.helper = helper
    passed = time.perf_counter() - begin
    if late:
        stuck: Misfit = "" if job.finished.is_set() else "stuck"
        return Outcome(None, RewardTimeoutError(seconds or 0.0), passed, stuck)
    error = job.exception
    if isinstance(error, INTERRUPTS):
        raise error
    misfit: Misfit = "thread" if job.needs_main or names_threads(error) else ""
    return Outcome(job.value, error, passed, misfit)


def names_threads(error: BaseException | None) -> bool:
    """Whether an exception, or what it came from, is about the thread that it was raised in."""
    while error is not None:
        if _OF_THREADS.search(str(error)):
            return True
        error = error.__cause__
    return False
