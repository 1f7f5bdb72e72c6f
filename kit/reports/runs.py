"""`RunRecord`, a run's `result.json`, and `RunComparison`, several runs side by side."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from kit.errors import RunError
from kit.samples import Sample
from kit.utils import pids
from kit.utils.display import Shown, pictures
from kit.utils.files import replace_file
from kit.utils.formatting import number, percent
from kit.utils.reading import first_line, read_json

RESULT = "result.json"
SETTINGS_VARIABLE = "KIT_RUN_SETTINGS"
"""Tells the notebook's kernel the settings of its run, as JSON; `kit run` sets it."""
Status = Literal["running", "completed", "failed", "interrupted"]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class WhatFailed(_Part):
    """Why a notebook did not run to its end."""

    name: str
    """The exception's class."""
    message: str
    cell: int | None = None
    """Which code cell raised, counted from 1; None where none did."""
    traceback: str = ""


class Process(_Part):
    """The process that runs the notebook."""

    pid: int
    started: str
    """When it started; see `kit.utils.pids.started`."""
    host: str

    @classmethod
    def me(cls) -> Process:
        """The process that calls."""
        started = pids.started(os.getpid()) or ""
        return cls(pid=os.getpid(), started=started, host=socket.gethostname())

    @property
    def lives(self) -> bool:
        """Whether it is running, as far as this machine can tell."""
        return self.host != socket.gethostname() or pids.started(self.pid) == self.started


class Attempt(_Part):
    """One time that a run was started: the first, or a resumption."""

    started: str
    status: str
    """How it ended; `killed` where it had no time to say so."""
    seconds: float | None = None


class Continued(_Part):
    """A training that went on from a checkpoint instead of from its beginning."""

    attempt: int
    session: int
    """Which session of the notebook, counted from 1."""
    training: int
    """Which of the session's calls of `train`, counted from 1."""
    step: int
    """The first step that was trained anew."""
    checkpoint: str | None
    """In the run's folder; None where there was none, and training began again."""


class Lineage(_Part):
    """Earlier attempts at a run, and its trainings that were continued from a checkpoint."""

    attempts: list[Attempt] = Field(default_factory=list)
    """Attempts before this one."""
    continued: list[Continued] = Field(default_factory=list)
    """By all attempts, in order."""


class RunSettings(BaseModel):
    """The options of `kit run`, which a session in the run's kernel follows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int | None = Field(default=None, ge=0)
    """Takes the place of every session's own; None where the notebook has a parameter for it, or
    none was given."""
    preset: str | None = None
    """Takes the place of a preset's name that a notebook starts a session with."""
    samples_every: int = Field(default=10, ge=0)
    """Keep the rollout of every so many steps in `samples.jsonl`; 0 keeps none."""
    checkpoint_every: int | None = Field(default=None, ge=0)
    """Save after every so many steps, where `checkpoint.interval` says nothing; 0 never. None: in
    the first step that ends five minutes after the last save, and of each training the newest."""
    keep_warm: float = Field(default=0.0, ge=0)
    """Minutes that the stack waits for the next run."""
    attempt: int = Field(default=1, ge=1)
    """1, and one more each time that the run is resumed."""
    folder: str = ""
    """The run's."""
    changes: dict[str, Any] = Field(default_factory=dict)
    """Settings that a resumed run continues with instead of its own, by their full names."""

    @classmethod
    def here(cls) -> RunSettings:
        """The settings of the run that this process belongs to."""
        text = os.environ.get(SETTINGS_VARIABLE)
        return cls.model_validate_json(text) if text else cls()


class RunRecord(_Part):
    """How a run was started, with what, and how it ended."""

    status: Status
    notebook: str
    """As it was named."""
    directory: str
    """The notebook's folder, in which its kernel works."""
    parameters: dict[str, Any]
    """All of them, as they were."""
    given: dict[str, Any] = Field(default_factory=dict)
    """Parameters that differ from the notebook's own."""
    settings: RunSettings = RunSettings()
    headline: dict[str, Any] = Field(default_factory=dict)
    """steps, reward_first, reward_last, tokens_per_second, dataset, mean_reward_before,
    mean_reward_after, and accuracy_before, accuracy_after where all rewards were 0 or 1."""
    seed: int | None = None
    """The seed of the first session; None where none was started."""
    versions: dict[str, str | None] = Field(default_factory=dict)
    git_commit: str | None = None
    """With `-dirty` where files had changed since."""
    machine: dict[str, Any] = Field(default_factory=dict)
    started: str
    seconds: float = 0.0
    lineage: Lineage = Field(default_factory=Lineage)
    process: Process | None = None
    """While it runs."""
    error: WhatFailed | None = None

    def write(self, folder: Path) -> Path:
        """Write `result.json`, in one move."""
        target = folder / RESULT
        text = json.dumps(self.model_dump(mode="json"), indent=2, default=str) + "\n"
        return replace_file(target, text)


def read_record(folder: Path) -> RunRecord:
    """Read a run's record.

    Raises:
        RunError: there is none, or it is not what `RunRecord` describes.
    """
    file = folder / RESULT
    try:
        return RunRecord.model_validate(read_json(file))
    except FileNotFoundError:
        raise RunError(
            f"{folder} is not a run's folder.",
            why=f"It has no {RESULT}.",
            fix="name a folder that `kit run` made.",
        ) from None
    except (OSError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read as the record of a run.",
            why=first_line(error),
            fix="it was changed, or written by another version of the kit; start a new run.",
        ) from None


@dataclass(frozen=True, slots=True)
class Band:
    """One metric of a group over the steps."""

    steps: tuple[int, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    runs: int
    """Number of runs that logged it."""
    full: bool
    """Whether all of them logged every one of these steps."""


def held_out(
    accuracies: tuple[float | None, float | None], rewards: tuple[float | None, float | None]
) -> tuple[str, str]:
    """(what it is, `42.0% → 97.8%`): accuracies before and after, else mean rewards.

    The second is empty where nothing was evaluated.
    """
    graded = accuracies == (None, None)
    name, say = ("mean reward", number) if graded else ("accuracy", percent)
    ends = rewards if graded else accuracies
    words = ["–" if value is None else say(value) for value in ends]
    return name, "" if ends == (None, None) else " → ".join(words)


def known_headline(row: Mapping[str, Any]) -> dict[str, Any]:
    """Headline of a record, without what it does not know.

    Version 0.1 called every mean reward an accuracy.
    """
    known = {name: value for name, value in row.items() if value is not None}
    if not any(name.startswith("mean_reward") for name in row):
        known = {name.replace("accuracy", "mean_reward"): v for name, v in known.items()}
    return known


@dataclass(frozen=True, slots=True)
class RunInfo:
    """What is known of a run without looking at its single steps."""

    folder: Path
    notebook: str
    """Name of the notebook, without its folder."""
    status: str
    """completed, failed, interrupted, running, killed; stopped for a member that its sweep ended
    early; unfinished where nothing says how it ended, unreadable where what would say it cannot be
    read; empty for what a session wrote by itself."""
    started: datetime | None = None
    seconds: float | None = None
    steps: int = 0
    reward_first: float | None = None
    reward_last: float | None = None
    tokens_per_second: float | None = None
    """Response tokens generated a second on a device, mean over the steps."""
    dataset: str | None = None
    mean_reward_before: float | None = None
    """Held out: of the first evaluation, before any step."""
    mean_reward_after: float | None = None
    """Of the last evaluation."""
    accuracy_before: float | None = None
    """The same where all rewards were 0 or 1; else None."""
    accuracy_after: float | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None
    versions: dict[str, str | None] = field(default_factory=dict)
    git_commit: str | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    sweep: str | None = None
    """The name of its sweep's folder."""
    fork_of: str | None = None
    """The name of the run whose session it was forked from; it is in that run's folder."""
    error: str | None = None
    faults: tuple[str, ...] = ()
    """What of its folder was left out because it cannot be read, and why."""

    @property
    def name(self) -> str:
        """The name of its folder; of a fork, below that of its run."""
        own = self.folder.name
        return f"{self.fork_of}/{self.folder.parent.name}/{own}" if self.fork_of else own

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON's types."""
        row = asdict(self) | {"folder": str(self.folder), "name": self.name}
        return row | {"started": self.started.isoformat() if self.started else None}


@dataclass(frozen=True, slots=True)
class Group:
    """Runs that differ only in their seed."""

    label: str
    """What tells it from the others."""
    runs: tuple[RunInfo, ...]
    bands: Mapping[str, Band]
    """By metric."""

    @property
    def seeds(self) -> list[int]:
        """The seeds of its runs, in order."""
        return sorted({run.seed for run in self.runs if run.seed is not None})

    def values(self, name: str) -> list[float]:
        """One fact of each run that has it, such as `accuracy_after`."""
        values = (getattr(run, name) for run in self.runs)
        return [value for value in values if value is not None]


@dataclass(frozen=True, slots=True)
class Difference:
    """Something in which groups differ."""

    kind: str
    """notebook, parameter, setting, version, or machine."""
    name: str
    values: tuple[str, ...]
    """One for each group; several of one group are joined by ` / `."""


@dataclass(frozen=True, slots=True)
class Side:
    """Responses of one group to one prompt."""

    step: int
    sample: Sample
    """The commonest; of several the first."""
    responses: int
    """How many there are to the same prompt in the same step."""
    reward: float | None
    """The mean over them."""
    alike: int = 1
    """How many of them are equal to the one that is shown."""


@dataclass(frozen=True, slots=True)
class RunComparison(Shown):
    """Runs side by side. Shows itself as curves, a table of differences, and samples."""

    groups: tuple[Group, ...]
    metrics: tuple[str, ...]
    """Drawn, in order."""
    differences: tuple[Difference, ...]
    alike: Mapping[str, str]
    """Parameters that are the same in all groups."""
    samples: tuple[tuple[Side | None, ...], ...] = ()
    """A row for each prompt, with a place for each group."""
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> list[RunInfo]:
        """The runs of all groups."""
        return [run for group in self.groups for run in group.runs]

    def save(self, path: str | Path) -> Path:
        """Write it as a page that needs neither scripts nor a network, in one move.

        Raises:
            RunError: it cannot be written there.
        """
        target = Path(path)
        if target.suffix.lower() not in (".html", ".htm"):
            raise RunError(f"A comparison is a page: {target} should end in .html.")
        try:
            replace_file(target, pictures().comparison_page(self))
        except OSError as error:
            raise RunError(f"{target} cannot be written.", why=str(error)) from None
        return target
