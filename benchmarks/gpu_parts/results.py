"""`Results`: what was measured, in a file that is written as soon as anything is known."""

from __future__ import annotations

import json
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from kit.models.source import ModelShape

State = Literal["running", "done", "failed", "skipped"]


@dataclass(slots=True)
class PartResult:
    """One part: how it ended, and its numbers."""

    state: State = "running"
    message: str = ""
    """Why it failed or was skipped."""
    began: float = 0.0
    """Seconds after the start of the command."""
    seconds: float = 0.0
    measured: dict[str, Any] = field(default_factory=dict)
    """Numbers, lists of numbers (one a repetition), or what the part's docstring says."""


@dataclass(slots=True)
class Results:
    """Everything of a run; `rows` are made from the rest."""

    card: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)
    """What was run, oldest first: parts that did not fit into one run are added by another."""
    workload: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    """Fields of a `ModelShape`."""
    parts: dict[str, PartResult] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, file: Path) -> Self:
        """What an earlier run wrote."""
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        parts = {name: PartResult(**part) for name, part in values.pop("parts").items()}
        return cls(**values, parts=parts)

    def write(self, file: Path) -> None:
        """Whole or not at all, so that a run that is cut off leaves the last whole state."""
        new = file.with_name(file.name + ".new")
        new.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        new.replace(file)

    @property
    def shape(self) -> ModelShape:
        """The model's sizes."""
        return ModelShape(**self.model)

    def get(self, part: str, name: str) -> Any:
        """A measured value; None where there is none."""
        return self.parts[part].measured.get(name) if part in self.parts else None

    def median(self, part: str, name: str) -> float | None:
        """Of a number's repetitions; None where there is none."""
        value = self.get(part, name)
        if value is None or value == []:
            return None
        return float(statistics.median(value) if isinstance(value, list) else value)
