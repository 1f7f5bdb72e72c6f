"""`Results`: what is known of each row, in a file that is written whenever there is more."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from benchmarks.device_parts.rows import Row
from kit.utils.files import replace_file

State = Literal["waiting", "running", "done", "failed", "cut off", "not run"]


@dataclass(slots=True)
class RowResult:
    """One row: how it ended, and its numbers."""

    row: Row
    state: State = "waiting"
    why: str = ""
    """Why it failed or did not run."""
    log: list[str] = field(default_factory=list)
    """The last lines of what it said, where it did not end well."""
    seconds: float = 0.0
    """Of the row as a whole."""
    beside: list[str] = field(default_factory=list)
    """Rows that ran on other devices of the machine at the same time."""
    measured: dict[str, Any] = field(default_factory=dict)
    """As `measure.scale` and `faults` hand it in."""


@dataclass(slots=True)
class Results:
    """Everything of a run."""

    machine: dict[str, Any] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    workload: dict[str, Any] = field(default_factory=dict)
    """What numbers of two runs must have in common to be compared."""
    rows: list[RowResult] = field(default_factory=list)

    def of(self, row: Row) -> RowResult:
        """What is known of a row; it is added where there is nothing."""
        found = next((each for each in self.rows if each.row == row), None)
        if found is None:
            found = RowResult(row)
            self.rows.append(found)
        return found

    def put(self, result: RowResult) -> None:
        """Take what is known of a row instead of what was."""
        self.rows = [result if each.row == result.row else each for each in self.rows]

    def shapes(self) -> list[str]:
        """Names of the shapes, in the order of their rows."""
        return list(dict.fromkeys(each.row.shape for each in self.rows))

    def write(self, file: Path) -> None:
        """Whole or not at all."""
        replace_file(file, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, file: Path) -> Self:
        """What an earlier run wrote."""
        values = json.loads(file.read_text(encoding="utf-8"))
        rows = [RowResult(**row | {"row": Row(**row["row"])}) for row in values.pop("rows")]
        return cls(**values, rows=rows)
