"""What a row's process runs: `python -m benchmarks.device_parts.worker TASK.json`."""

from __future__ import annotations

import json
import sys
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.device_parts.rows import FAULTS, SWEEP
from benchmarks.device_parts.task import Task


@dataclass(slots=True)
class Report:
    """Hands in numbers, which are in the row's file from then on, whatever comes."""

    task: Task
    begin: float = field(default_factory=time.time)
    measured: dict[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """A line of progress, into the log."""
        print(f"[{time.time() - self.begin:6.1f} s] {self.task.row.key}: {text}", flush=True)

    def put(self, name: str, value: Any) -> None:
        """A measured value; a number, or what JSON can hold."""
        self.measured[name] = value
        new = self.task.result.with_suffix(".new")
        new.write_text(json.dumps(self.measured), encoding="utf-8")
        new.replace(self.task.result)

    def left(self) -> float:
        """Seconds until the row is ended."""
        return self.task.deadline - time.time()


def main(file: str) -> int:
    """Run a row; the exit code."""
    from benchmarks.device_parts import faults, measure

    report = Report(Task.read(Path(file)))
    run = {FAULTS: faults.faults, SWEEP: faults.sweep}.get(report.task.row.way, measure.scale)
    try:
        run(report.task, report)
    except Exception as error:
        traceback.print_exc()
        report.put("error", f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
