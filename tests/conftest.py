"""The real stack on the tiny model, started once for all tests that need one."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from kit import RLSession, checkpoint
from kit.data.stream import PromptStream

# What a busy machine takes for an example says nothing of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A test run in the background is started with interrupts ignored, and some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RLSession, Path]]:
    """A running session, and a checkpoint of its first moment."""
    os.environ.pop("KIT_RUN_DIR", None)
    session = RLSession.start("tiny")
    first = session.save(tmp_path_factory.mktemp("running") / "first")
    yield session, first
    session.close()


@pytest.fixture
def session(running: tuple[RLSession, Path]) -> RLSession:
    """The running session, brought back to its first moment."""
    session, first = running
    reset(session, first)
    return session


@pytest.fixture
def reseeded(running: tuple[RLSession, Path]) -> Callable[[int], RLSession]:
    """Brings the running session back to its first moment, with another seed."""

    def restart(seed: int) -> RLSession:
        reset(*running, seed)
        return running[0]

    return restart


def reset(session: RLSession, first: Path, seed: int = 0) -> None:
    """Weights, optimizer, data, counters and randomness as at the start with this seed."""
    config, state = checkpoint.read(first)
    session.config = config.replace("seed", seed)
    session._stream = PromptStream(session._prompting.train, seed)
    fresh: dict[str, Any] = state | {"stream": session._stream.state()}
    checkpoint.restore(session, session._running, first, fresh)
    session.last_rollout = None
