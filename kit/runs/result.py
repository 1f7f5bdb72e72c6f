"""`RunRecord`: a run's `result.json`, written when it starts and when it ends."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from kit.errors import RunError
from kit.runs.settings import RunSettings
from kit.stack import registry

RESULT = "result.json"

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
    """Which process runs the notebook."""

    pid: int
    started: str
    """When it started; see `kit.stack.registry.started`."""
    host: str

    @classmethod
    def me(cls) -> Process:
        """This one."""
        started = registry.started(os.getpid()) or ""
        return cls(pid=os.getpid(), started=started, host=socket.gethostname())

    @property
    def lives(self) -> bool:
        """Is it running, as far as this machine can tell?"""
        return self.host != socket.gethostname() or registry.started(self.pid) == self.started


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
    """What a run came from."""

    attempts: list[Attempt] = Field(default_factory=list)
    """Those before this one."""
    continued: list[Continued] = Field(default_factory=list)
    """By all attempts, in order."""


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
    """Those that were not the notebook's own."""
    settings: RunSettings = RunSettings()
    headline: dict[str, Any] = Field(default_factory=dict)
    """steps, reward_first, reward_last, dataset, accuracy_before, accuracy_after."""
    seed: int | None = None
    """Of the first session; None where none was started."""
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
        return write_whole(target, text)


def read_record(folder: Path) -> RunRecord:
    """A run's record.

    Raises:
        RunError: there is none, or it is not what `RunRecord` describes.
    """
    file = folder / RESULT
    try:
        return RunRecord.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(
            f"{folder} is not a run's folder.",
            why=f"It has no {RESULT}.",
            fix="name a folder that `kit run` made.",
        ) from None
    except (OSError, ValidationError, ValueError) as error:
        raise RunError(
            f"{file} cannot be read as the record of a run.",
            why=str(error).splitlines()[0],
            fix="it was changed, or written by another version of the kit; start a new run.",
        ) from None


def write_whole(target: Path, text: str) -> Path:
    """Write a file so that nobody ever sees half of it."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
