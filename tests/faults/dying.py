"""Processes of a stack, to be killed by id."""

from __future__ import annotations

import psutil

from kit import RLSession
from kit.cluster.processes import TRAINER, engine

SCHEDULER, DETOKENIZER = 1, 2


def of_engine(session: RLSession, index: int, which: int = 0) -> psutil.Process:
    """The engine's actor (0), its scheduler (1) or its detokenizer (2)."""
    return _members(session, engine(index))[which]


def of_trainer(session: RLSession) -> psutil.Process:
    return _members(session, TRAINER)[0]


def of_head(session: RLSession, which: int) -> psutil.Process:
    """The stack's first process (0), Ray's control service (1) or its raylet (2)."""
    return _members(session, "head")[which]


def kill(process: psutil.Process) -> None:
    """As a lack of memory does, and wait until it is gone."""
    process.kill()
    process.wait(30)


def _members(session: RLSession, part: str) -> list[psutil.Process]:
    return [process for process in session._running.watch._parts[part] if process]
