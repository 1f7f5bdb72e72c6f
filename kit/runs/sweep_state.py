"""`sweep.json`: what a sweep is, and how far each of its members came.

It is written anew in one move whenever something changes, so a reader never sees half of it, and a
sweep that was killed can be resumed from it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from kit.errors import RunError

SWEEP = "sweep.json"

State = Literal["waiting", "running", "completed", "failed", "stopped", "interrupted", "killed"]
"""Of a member. `stopped` is an early end by a rule; `killed` an end by a signal from elsewhere."""

DONE: tuple[State, ...] = ("completed", "stopped")
"""What `kit sweep --resume` leaves as it is."""
SIGNS: dict[State, str] = {
    "waiting": "○",
    "running": "▶",
    "completed": "✓",
    "failed": "✗",
    "stopped": "■",
    "interrupted": "‖",
    "killed": "✗",
}


class _Row(BaseModel):
    model_config = ConfigDict(validate_assignment=True, use_attribute_docstrings=True)


class Member(_Row):
    """One run of a sweep."""

    number: int
    """Counted from 1."""
    parameters: dict[str, Any]
    """What it is given beside the notebook's own values."""
    state: State = "waiting"
    folder: str | None = None
    """Its run's folder, inside of the sweep's; None before its first start."""
    attempts: int = 0
    """How often it was started."""
    exit_code: int | None = None
    steps: int = 0
    reward_first: float | None = None
    reward_last: float | None = None
    seconds: float = 0.0
    why: str = ""
    """Why it failed or was stopped."""


class SweepRecord(_Row):
    """A whole sweep."""

    notebook: str
    fixed: dict[str, Any] = {}
    grid: dict[str, list[Any]] = {}
    seeds: list[int] = []
    parallel: int = 1
    stop_below: str | None = None
    """As given: REWARD@STEP."""
    stop_median: int | None = None
    """From which step on."""
    status: Literal["running", "completed", "failed", "interrupted"] = "running"
    started: str = ""
    seconds: float = 0.0
    """Over all its resumptions."""
    members: list[Member]

    def save(self, folder: Path) -> None:
        """Write it into the sweep's folder, in one move."""
        partial = folder / f".{SWEEP}.{os.getpid()}"
        partial.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")
        partial.replace(folder / SWEEP)

    def in_state(self, *states: State) -> list[Member]:
        """The members in one of these states."""
        return [member for member in self.members if member.state in states]

    @property
    def varied(self) -> list[str]:
        """Names of the parameters in which members differ."""
        return [*self.grid, *(["seed"] if len(self.seeds) > 1 else [])]


def read_sweep(folder: str | Path) -> SweepRecord:
    """What `sweep.json` in this folder says.

    Raises:
        RunError: there is none, or it is damaged.
    """
    file = Path(folder) / SWEEP
    try:
        return SweepRecord.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise RunError(
            f"{folder} is no sweep: it has no {SWEEP}.",
            fix="give the folder that `kit sweep` named when it began; `kit runs` lists them.",
        ) from None
    except (OSError, ValidationError) as error:
        raise RunError(f"{file} cannot be read.", why=str(error)[:400]) from None


def is_sweep(folder: Path) -> bool:
    """Does this folder belong to a sweep?"""
    return (folder / SWEEP).is_file()
