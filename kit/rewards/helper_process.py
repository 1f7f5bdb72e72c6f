"""A helper process: takes pickled requests, gives back lines of JSON, and can be killed.

    notebook ──(pickled request)──► helper      ends when its input does, so with the notebook
             ◄──(JSON line)────────

Requests are made by the notebook itself; what comes back has touched text that a model wrote, and
is not unpickled.
"""

from __future__ import annotations

import os
import pickle
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kit.utils.forks import at_exit
from kit.utils.reading import parse_json


class HelperProcess:
    """A process that runs one script: started when first asked, and again after it was ended.

    The script is beside this module, or anywhere where its whole path is given.

    Whoever asks holds `lock` from the request to the last line of its reply.
    """

    def __init__(self, script: str, *, stderr: int | None = subprocess.DEVNULL) -> None:
        self.lock = threading.Lock()
        self._script = Path(__file__).parent / script
        self._stderr = stderr
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0
        at_exit(self.end)

    @property
    def alive(self) -> bool:
        """Whether the process runs, and belongs to this one."""
        process = self._process
        return process is not None and self._owner == os.getpid() and process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """Exit code of a process that ended by itself, or is about to; None otherwise."""
        return self._process.wait(10) if self._process else None

    def send(self, request: Any) -> None:
        """Send a request, to a new process if there is none."""
        if not self.alive:
            self._start()
        assert self._process is not None
        assert self._process.stdin is not None
        pickle.dump(request, self._process.stdin)
        self._process.stdin.flush()

    def reply(self, seconds: float | None) -> dict[str, Any] | None:
        """The next line of the reply; None if the process ended or the time is up.

        Args:
            seconds: how long to wait; None waits for ever.
        """
        assert self._process is not None
        assert self._process.stdout is not None
        pipe = self._process.stdout.fileno()
        deadline = None if seconds is None else time.monotonic() + seconds
        line = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
                if not selector.select(left):
                    return None
                # One byte at a time: the next line may already be waiting behind this one.
                byte = os.read(pipe, 1)
                if not byte:
                    return None
                line += byte
        reply: dict[str, Any] = parse_json(bytes(line))
        return reply

    def end(self) -> None:
        """End the process, whatever it does. The next request starts another."""
        process, self._process = self._process, None
        if process is None or self._owner != os.getpid():  # forked: the pipes are the parent's
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                try:
                    pipe.close()
                except BrokenPipeError:  # an unsent request in the buffer of a dead helper
                    continue

    def _start(self) -> None:
        self.end()
        # -P: the worker's own folder must not shadow modules of the standard library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._owner = os.getpid()
