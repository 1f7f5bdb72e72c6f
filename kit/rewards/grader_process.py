"""A helper process for the graders that compute with what a model wrote.

math-verify and reasoning-gym hand parts of a response to sympy, which a few characters
(`9^{9^{9^9}}`) can keep busy for hours. A timer could stop it, but timers only reach the main
thread of a process, and not inside every library. So these graders run in a process of their own,
which any thread may ask and which has a few seconds of CPU time and a bound on memory for each
answer. A response that exceeds them is graded 0.

    notebook ──(pickled request)──► helper      loads a library once, then about 1 ms a grade
             ◄──(JSON line)────────             ends when its input does, so with the notebook
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kit.errors import RewardError

CPU_SECONDS = 5.0
"""Processor time that grading one answer may take."""
_LOAD_SECONDS = 300.0
_WALL_SECONDS = 120.0
"""Last resort; the helper's own limits count CPU time, so that a busy machine is no reason."""


class Apart:
    """The helper process: started by the first call, and again after it had to be ended."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        atexit.register(self.close)

    def grade(self, kind: str, **arguments: Any) -> float:
        """Score one answer; 0 if computing it took too much time or memory.

        Raises RewardError where the label or row cannot be graded against, and where the helper
        cannot do its work.
        """
        with self._lock:
            try:
                reply = self._ask(kind, arguments)
            except BaseException:
                # An interrupt between question and answer would leave the answer for the next.
                self._end()
                raise
        if "error" in reply:
            raise RewardError(
                f"{kind} cannot grade this row: {reply['error']}",
                fix="correct the row's label, or choose a reward that fits it.",
            )
        return float(reply["score"])

    def close(self) -> None:
        """End the process. The next `grade` starts another."""
        with self._lock:
            self._end()

    def _ask(self, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
        process = self._running()
        assert process.stdin is not None
        pickle.dump((kind, arguments, self._cpu_seconds), process.stdin)
        process.stdin.flush()
        loaded = self._reply(process, _LOAD_SECONDS)
        if loaded is None or "broken" in loaded:
            why = loaded["broken"] if loaded else f"it ended with exit code {process.wait(10)}"
            raise RewardError(
                f"The grader of {kind} could not start.",
                why=f"Its helper process says: {why}.",
                fix="check that math-verify and reasoning-gym are installed as "
                "requirements.lock has them.",
            )
        reply = self._reply(process, _WALL_SECONDS)
        if reply is None:
            self._end()
            return {"score": 0.0}
        return reply

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._owner != os.getpid():
            self._process = None  # forked: the pipes belong to the parent
        if self._process is None or self._process.poll() is not None:
            self._end()
            # -P: the worker's own folder must not shadow modules of the standard library.
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(Path(__file__).with_name("grader_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            self._owner = os.getpid()
        return self._process

    @staticmethod
    def _reply(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
        """The next line of the reply; None if the process ended or the time is up."""
        assert process.stdout is not None
        deadline = time.monotonic() + seconds
        line = b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(deadline - time.monotonic()):
                    return None
                # One byte at a time: the next line may already be waiting behind this one.
                byte = os.read(process.stdout.fileno(), 1)
                if not byte:
                    return None
                line += byte
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # an unsent request in the buffer of a dead helper
                    continue


helper = Apart()
"""The one that the built-in rewards share."""
