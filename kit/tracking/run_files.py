"""`RunFiles`: what a run's folder says, with a list of what in it cannot be read.

A run is read as far as it came, and as far as it can be: a killed one ends in half a line, and one
from elsewhere may hold anything. A file that is missing is empty. A file or a line that is there
and is not what it should be is left out, and `faults` says which and why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from kit.reports import REWARD
from kit.utils import reading, strict_yaml
from kit.utils.formatting import shorten
from kit.utils.reading import UnreadableError, kind_of

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
SAMPLES = "samples.jsonl"
LARGEST_STEP = 2**53
MOST_FAULTS = 20

Row = dict[str, Any]


class RunFiles:
    """Reader of one run's folder.

    Args:
        folder: the run's.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.faults: list[str] = []
        """A line for each file or row that was left out: the first `MOST_FAULTS` of them."""

    def object(self, name: str) -> Row:
        """Read a JSON object."""
        return self._mapping(name, reading.read_json)

    def settings(self, name: str = CONFIG) -> Row:
        """Read a YAML mapping whose names are words."""
        return self._mapping(name, lambda file: strict_yaml.read_yaml(file) or {})

    def _mapping(self, name: str, read: Any) -> Row:
        try:
            found = reading.mapping(read(self.folder / name))
        except FileNotFoundError:
            return {}
        except (OSError, UnreadableError) as error:
            self.fault(name, error)
            return {}
        return {str(key): value for key, value in found.items()}

    def rows(self, name: str) -> list[Row]:
        """Read the mappings of a JSON lines file; a last line that is being written is left out."""
        return [row for _, row in self.numbered(name)]

    def numbered(self, name: str) -> Iterator[tuple[int, Row]]:
        """Number and mapping of each line of a JSON lines file."""
        waiting: tuple[int, UnreadableError] | None = None
        try:
            for number, line in reading.read_lines(self.folder / name):
                if waiting:
                    self.fault(f"{name}, line {waiting[0]}", waiting[1])
                    waiting = None
                if not line.strip():
                    continue
                try:
                    row = reading.parse_json(line)
                except UnreadableError as error:
                    waiting = number, error  # of no account in the last line
                    continue
                try:
                    yield number, reading.mapping(row)
                except UnreadableError as error:
                    self.fault(f"{name}, line {number}", error)
        except FileNotFoundError:
            return
        except (OSError, UnreadableError) as error:
            self.fault(name, error)

    def metrics(self) -> list[Row]:
        """Rows of `metrics.jsonl`: a whole number `step`, and numbers by name.

        What is no number is left out; a run writes null for one that is not finite.
        """
        rows = []
        for number, row in self.numbered(METRICS):
            if (step := self._step(f"{METRICS}, line {number}", row)) is not None:
                rows.append({name: _number(value) for name, value in row.items()} | {"step": step})
        return rows

    def evaluations(self) -> list[Row]:
        """Rows of `evaluations.jsonl`: `dataset`, `step`, `mean_reward`, `accuracy`.

        Version 0.1 called the mean reward accuracy.
        """
        rows = []
        for number, row in self.numbered(EVALUATIONS):
            where = f"{EVALUATIONS}, line {number}"
            step = self._step(where, row)
            if not isinstance(name := row.get("dataset"), str):
                self.fault(where, UnreadableError(f"its dataset is {kind_of(name)}"))
            elif step is not None:
                known = {key: _number(row.get(key)) for key in ("mean_reward", "accuracy")}
                if "mean_reward" not in row:
                    known = {"mean_reward": known["accuracy"], "accuracy": None}
                rows.append(row | known | {"step": step})
        return rows

    def samples(self) -> Iterator[tuple[int, Row]]:
        """Step and sample of each line of `samples.jsonl`."""
        for number, row in self.numbered(SAMPLES):
            step = self._step(f"{SAMPLES}, line {number}", row)
            if step is not None:
                yield step, {k: v for k, v in row.items() if k not in ("step", "rollout")}

    def rewards(self) -> list[tuple[int, float]]:
        """(step, mean reward) of each training step that has one."""
        return [(row["step"], row[REWARD]) for row in self.metrics() if row.get(REWARD) is not None]

    def fault(self, where: str, error: BaseException | str) -> None:
        """Note that something was left out."""
        why = error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error)
        line = shorten(f"{where}: {why}", 300)
        if line not in self.faults and len(self.faults) < MOST_FAULTS:
            self.faults.append(line)

    def _step(self, where: str, row: Row) -> int | None:
        step = row.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step <= LARGEST_STEP:
            return step
        self.fault(where, "its step is no number of a step" if "step" in row else "it has no step")
        return None


def _number(value: Any) -> float | int | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if math.isfinite(value) else None


def told(faults: Iterable[str]) -> str:
    """Faults on one line: the first, and how many more."""
    first, *more = faults
    return f"{first}; and {len(more)} more" if more else first
