"""Start-up stages of a stack's processes, passed to the client through small files.

Each process writes one file into the stack's directory, anew at each stage, and the client reads
them when it likes. Nobody waits for anybody, and a start goes on where a file cannot be written.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from kit.utils.files import replace_file
from kit.utils.reading import read_json

DIRECTORY_ENV = "KIT_STAGES"
"""Holds the stack's directory in the environment of each of its processes."""
READY = "ready"


@dataclass(frozen=True, slots=True)
class Stage:
    """Start-up stage of the engine or the trainer."""

    words: str
    since: float
    """When it began, in seconds of `time.monotonic()`, which all processes of a machine share."""

    @property
    def ready(self) -> bool:
        """Whether it has nothing left to do."""
        return self.words == READY


def report(who: str, stage: str) -> None:
    """Report the stage of this process; no effect unless a client asked for it.

    Args:
        who: `engine` or `trainer`.
        stage: in words, such as `loading weights`; `READY` at the end.
    """
    directory = os.environ.get(DIRECTORY_ENV)
    if not directory:
        return
    file = Path(directory) / f"stage-{who}-{os.getpid()}"
    with contextlib.suppress(OSError):
        replace_file(file, json.dumps([stage, time.monotonic()]))


def read(directory: str | Path) -> dict[str, Stage]:
    """Stage of engine and trainer, where known: of several processes, the one furthest behind."""
    found: dict[str, list[Stage]] = {}
    for file in Path(directory).glob("stage-*"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            words, since = read_json(file)
            found.setdefault(file.name.split("-")[1], []).append(Stage(words, since))
    return {who: _behind(told) for who, told in found.items()}


def _behind(told: list[Stage]) -> Stage:
    working = [stage for stage in told if not stage.ready]
    if working:
        return min(working, key=lambda stage: stage.since)
    return max(told, key=lambda stage: stage.since)
