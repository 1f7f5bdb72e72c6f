"""`Finding` and `Diagnosis`: what was looked at, what was found, and what to do about it."""

from __future__ import annotations

import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kit.errors import KitError
from kit.reports import Shown

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a session needs, as it is on this machine."""

    name: str
    level: Level
    """`ok` is in order, `note` is good to know, `problem` keeps a session from starting well."""
    found: str
    fix: str = ""
    """What to do next; empty where there is nothing to do."""
    commands: tuple[str, ...] = ()
    """Lines to copy into a terminal, in this order."""

    @classmethod
    def of_error(cls, name: str, error: KitError) -> Finding:
        """The problem that starting a session would raise."""
        return cls(name, "problem", " ".join(filter(None, (error.what, error.why))), error.fix)


@dataclass(frozen=True, slots=True)
class Diagnosis(Shown):
    """Whether a session with these settings can start on this machine, check by check."""

    name: str
    """Of the configuration."""
    model: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def problems(self) -> tuple[Finding, ...]:
        """What has to be mended first."""
        return tuple(finding for finding in self.findings if finding.level == "problem")

    @property
    def ready(self) -> bool:
        """Nothing that was looked at is a problem."""
        return not self.problems


def program(name: str) -> str:
    """How to call a program of this Python's environment, which need not be on the path."""
    beside = Path(sys.executable).parent / name
    if not beside.exists() or shutil.which(name) == str(beside):
        return name
    return shlex.quote(str(beside))
