"""`sweep.json`: the record of a sweep, and the state of each member.

It is written anew in one move whenever something changes, so a reader never sees half of it, and a
sweep that was killed can be resumed from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, field_validator

from kit.errors import RunError
from kit.tracking.run_folder import SWEEP
from kit.utils.files import replace_file
from kit.utils.reading import first_line, read_json

State = Literal["waiting", "running", "completed", "failed", "stopped", "interrupted", "killed"]
"""State of a member. `stopped`: ended early by a rule; `killed`: ended by a signal."""

DONE: tuple[State, ...] = ("completed", "stopped")
"""What `kit sweep --resume` leaves as it is."""
SIGNS = {
    "waiting": "○",
    "running": "▶",
    "completed": "✓",
    "failed": "✗",
    "stopped": "■",
    "interrupted": "‖",
    "killed": "✗",
    "unfinished": "?",
    "unreadable": "?",
}
"""Of members by their state, and of runs by their status."""
STYLES = {"completed": "green", "failed": "red", "killed": "red", "running": "cyan"}
STYLES["unreadable"] = "yellow"


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
    """Folder of its run, inside the sweep's; None before its first start."""
    attempts: int = 0
    """How often it was started."""
    exit_code: int | None = None
    steps: int = 0
    reward_first: float | None = None
    reward_last: float | None = None
    seconds: float = 0.0
    why: str = ""
    """Why it failed or was stopped."""

    @field_validator("folder")
    @classmethod
    def _inside(cls, folder: str | None) -> str | None:
        if folder is not None and (folder in ("", ".", "..") or "/" in folder or "\0" in folder):
            raise ValueError("a member's folder is a name inside its sweep's folder")
        return folder


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
        replace_file(folder / SWEEP, self.model_dump_json(indent=2) + "\n")

    def in_state(self, *states: State) -> list[Member]:
        """The members in one of these states."""
        return [member for member in self.members if member.state in states]

    @property
    def varied(self) -> list[str]:
        """Names of the parameters in which members differ."""
        return [*self.grid, *(["seed"] if len(self.seeds) > 1 else [])]


def read_sweep(folder: str | Path) -> SweepRecord:
    """Read `sweep.json` in a folder.

    Raises:
        RunError: there is none, or it is damaged.
    """
    file = Path(folder) / SWEEP
    try:
        return SweepRecord.model_validate(read_json(file))
    except FileNotFoundError:
        raise RunError(
            f"{folder} is no sweep: it has no {SWEEP}.",
            fix="give the folder that `kit sweep` named when it began; `kit runs` lists them.",
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(f"{file} cannot be read.", why=first_line(error)) from None


Rewards = Sequence[tuple[int, float]]
"""(step, mean reward) of each training step."""

FEWEST_OTHERS = 3
"""A median of fewer members says little."""


@dataclass(frozen=True, slots=True)
class StopBelow:
    """End a member whose reward at one step is below a bound."""

    reward: float
    step: int

    @classmethod
    def parse(cls, text: str) -> StopBelow:
        """Read `REWARD@STEP`. Raises RunError for anything else."""
        reward, at, step = text.partition("@")
        try:
            if not at:
                raise ValueError(text)
            return cls(float(reward), int(step))
        except ValueError:
            raise RunError(
                f"--stop-below is {text!r}.",
                fix="write REWARD@STEP, such as 0.3@20: less than 0.3 at step 20.",
            ) from None

    def why(self, rewards: Rewards) -> str:
        """The reason to end this member; empty where there is none."""
        found = next(((step, value) for step, value in rewards if step >= self.step), None)
        if found is None or found[1] >= self.reward:
            return ""
        return f"reward {found[1]:.3f} at step {found[0]}, below {self.reward:g}"


@dataclass(frozen=True, slots=True)
class StopMedian:
    """End a member whose mean reward so far is below the median of the others' at the same step.

    The rule of Google Vizier (Golovin et al., 2017, section 3.2.2), with the mean in place of the
    best value: the reward of a single step is noise.
    """

    after: int
    """Steps that every member may take first."""

    def why(self, rewards: Rewards, others: Sequence[Rewards]) -> str:
        """The reason to end this member; empty where there is none.

        Args:
            rewards: of the member.
            others: of those that run or have run to their end.
        """
        if not rewards or rewards[-1][0] < self.after:
            return ""
        step = rewards[-1][0]
        reached = [_mean_until(other, step) for other in others if other and other[-1][0] >= step]
        if len(reached) < FEWEST_OTHERS:
            return ""
        own, middle = _mean_until(rewards, step), median(reached)
        if own >= middle:
            return ""
        return (
            f"mean reward {own:.3f} until step {step}, below {middle:.3f}, the median of "
            f"{len(reached)} others"
        )


def _mean_until(rewards: Rewards, step: int) -> float:
    return fmean(value for at, value in rewards if at <= step)
