"""`Watch`: who is seen to have died, and in which order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing

import psutil
import pytest

from kit.cluster.processes import HEAD, TRAINER, Watch
from tests.cases import some

LARGE = """
import threading
for _ in range(20):
    threading.Thread(target=threading.Event().wait, daemon=True).start()
memory = b"x" * 200_000_000
print(flush=True)
threading.Event().wait()
"""


@pytest.fixture
def watch() -> Iterator[Watch]:
    """Looks when asked only."""
    watch = Watch(interval=1000.0, on_death=lambda part: None)
    yield watch
    watch.close()


def start(code: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)


@pytest.fixture
def busy_machine() -> Iterator[None]:
    """More work than cores, so that a process may have to wait in the middle of its end."""
    with ExitStack() as stack:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            stack.callback(stack.enter_context(start("while True: pass")).kill)
        yield


@pytest.mark.wider
@pytest.mark.usefixtures("busy_machine")
def test_a_death_that_can_be_noticed_is_seen(watch: Watch) -> None:
    """Who reads from a dying process knows before it is a zombie, and may die of it."""
    for _ in range(some(4, 20)):
        with start(LARGE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            watch.add(HEAD, [process.pid])
            assert watch.dead() == set()
            psutil.Process(process.pid).kill()
            assert process.stdout.read() == b""  # its end of the pipe is closed
            assert watch.dead() == {HEAD}
            process.wait()


def test_what_brought_death_is_seen_with_what_died_of_it() -> None:
    """The head is looked at first, and dies while the trainer is buried."""
    with start(LARGE) as head, start(LARGE) as trainer:

        def die(_: str) -> None:
            head.kill()
            head.wait()

        with closing(Watch(interval=1000.0, on_death=die)) as watch:
            watch.add(HEAD, [head.pid])
            watch.add(TRAINER, [trainer.pid])
            trainer.kill()
            trainer.wait()
            assert watch.dead() == {HEAD, TRAINER}
