"""A row in a process of its own: started on its devices, followed, ended at its time limit."""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from benchmarks.device_parts.task import Task
from kit.cluster import registry
from kit.cluster.processes import CORES_VARIABLE
from kit.tracking.recorder import GROUP_VARIABLE, RUN_DIR_VARIABLE
from kit.utils.hardware import VISIBLE

GRACE = 15.0
"""Seconds that a row gets to end in order when its time is over."""
LAST_LINES = 15
"""Of a log, shown where a row failed."""


@dataclass(slots=True)
class Child:
    """A row's process."""

    task: Task
    process: subprocess.Popen[bytes]
    group: str
    """By which its session's own processes are found."""
    begin: float
    read: float = 0.0
    """When the result that was last read was written."""

    @classmethod
    def start(cls, task: Task, devices: Sequence[str], cores: int | None) -> Child:
        """Start it.

        Args:
            task: what it does.
            devices: GPUs, as CUDA_VISIBLE_DEVICES names them; none on a CPU.
            cores: that it may keep busy, where others run beside it.
        """
        task.write()
        group = secrets.token_hex(8)
        env = {k: v for k, v in os.environ.items() if k != RUN_DIR_VARIABLE}
        env |= {GROUP_VARIABLE: group, "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        if task.device == "cuda":
            env[VISIBLE] = ",".join(devices)
        if cores:
            env[CORES_VARIABLE] = str(cores)
        with task.log.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.device_parts.worker", str(task.file)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # so that a kill reaches what it has started
            )
        return cls(task, process, group, time.time())

    def news(self) -> dict[str, Any] | None:
        """What it has measured so far, if that is more than at the last call."""
        with suppress(OSError, ValueError):
            written = self.task.result.stat().st_mtime
            if written > self.read:
                measured: dict[str, Any] = json.loads(self.task.result.read_text("utf-8"))
                self.read = written
                return measured
        return None

    def ended(self) -> bool:
        """Whether it has ended by itself."""
        return self.process.poll() is not None

    def end(self) -> None:
        """End it, its children, and its session's processes, which are in a session of their own.

        Where it has ended in order this finds nothing.
        """
        if not self.ended():
            self._signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
        self._signal(signal.SIGKILL)
        self.process.wait()
        for entry in registry.living():
            if entry.group == self.group:
                registry.terminate(entry)

    def last_lines(self) -> list[str]:
        """Of its log."""
        text = self.task.log.read_bytes().decode("utf-8", "replace")
        return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)
