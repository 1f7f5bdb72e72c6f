"""Processes of their own for parts: a crash, a leak or a hang of one stays there."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal

from benchmarks.gpu_parts.workload import Workload

GRACE = 10.0
"""Seconds past the limit until a child is killed."""
FREED_WITHIN = 5.0
"""Seconds that a killed child's own processes get to give the card back."""
Kind = Literal["begin", "say", "put", "done", "failed", "skipped"]
ENDS = ("done", "failed", "skipped")
NO_TIME = "no time was left"
Message = tuple[str, Kind, Any]
"""(part, kind, what)."""


@dataclass(slots=True)
class Report:
    """A part's way to say something and to hand in a number, from within its process."""

    channel: Connection
    deadline: float
    """In seconds of `time.time`, which all processes share."""
    part: str = ""

    def say(self, text: str) -> None:
        """A line of progress."""
        self.send("say", text)

    def put(self, name: str, value: Any) -> None:
        """A measured value; in the file from now on, whatever comes."""
        self.send("put", (name, value))

    def left(self) -> float:
        """Seconds until the limit."""
        return self.deadline - time.time()

    def send(self, kind: Kind, what: Any = None) -> None:
        """To the process that keeps the results."""
        self.channel.send((self.part, kind, what))


Run = Callable[[Any, Workload, Report], None]
Host = Callable[[Workload, Report], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Part:
    """Something to measure."""

    name: str
    title: str
    seconds: float
    """What it takes at least: it is not begun with less time left."""
    run: Run
    """Called with what the host gives."""
    host: Host | None = None
    """Parts of one host share a process, and what it gives."""


def serve(channel: Connection, parts: Sequence[Part], workload: Workload, deadline: float) -> None:
    """What the child does: the parts, one after the other."""
    os.setsid()  # so that a kill reaches what it has started
    report = Report(channel, deadline)
    with contextlib.ExitStack() as cleanup:
        shared: Any = None
        for number, part in enumerate(parts):
            report.part = part.name
            if number and report.left() < part.seconds:
                report.send("skipped", NO_TIME)
                continue
            report.send("begin")
            try:
                if number == 0 and part.host:
                    shared = cleanup.enter_context(part.host(workload, report))
                part.run(shared, workload, report)
            except Exception as error:
                traceback.print_exc()
                report.send("failed", f"{type(error).__name__}: {error}")
                if number == 0 and part.host and shared is None:
                    return  # the rest has nothing to work on
            else:
                report.send("done")


def run_apart(parts: Sequence[Part], workload: Workload, deadline: float) -> Iterator[Message]:
    """Run parts in one child process, and give what they send. Nothing of it is left afterwards.

    A part that the child did not answer for is `failed`.
    """
    ours, theirs = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(
        target=serve, args=(theirs, list(parts), workload, deadline)
    )
    child.start()
    theirs.close()
    open_parts = [part.name for part in parts]
    why = ""
    try:
        while open_parts:
            if not ours.poll(max(0.0, deadline + GRACE - time.time())):
                why = "the time limit came first"
                break
            message: Message = ours.recv()
            if message[1] in ENDS:
                open_parts.remove(message[0])
            yield message
    except EOFError:
        child.join()
        why = f"its process ended with exit code {child.exitcode}"
    finally:
        _end(child, in_order=not open_parts)
    yield from ((name, "failed", why) for name in open_parts)


def _end(child: Any, in_order: bool) -> None:
    if in_order:
        child.join(timeout=60.0)  # a session that closes
    in_order = in_order and not child.is_alive()
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()  # it may not have come to have a group of its own
    child.join()
    if not in_order:
        time.sleep(FREED_WITHIN)  # a session's own processes end when they miss their client
