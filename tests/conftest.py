"""The real stack on the tiny model, started once for all tests that need one."""

from __future__ import annotations

import atexit
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from kit import RLSession, SessionConfig
from kit.checkpoint import checkpoint
from kit.cluster import registry
from kit.data.stream import PromptStream
from tests.cases import EVERY, MINUTES, some, wanted
from tests.lessons import notebook_times

# What a busy machine takes for an example says nothing of the code. Examples are the same each time
# where a change is judged; every test, run at leisure, looks for new ones.
settings.register_profile(
    "judging", deadline=None, derandomize=not EVERY, max_examples=some(25, 100)
)
settings.load_profile("judging")

# A test run in the background is started with interrupts ignored, and some tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Sessions of whoever runs the tests are none of theirs.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-of-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


BEGAN = time.monotonic()
LONGEST_FIRST = (
    "runs/test_sweep.py",
    "runs/test_resume.py",
    "test_notebooks.py",
    "lifecycle/test_attach.py",
    "stack/test_devices.py",
    "lifecycle/test_warm.py",
    "diagnostics/test_trainer_against_engine.py",
    "diagnostics/test_agreement.py",
    "lifecycle/test_start_again.py",
    "lifecycle/test_start_and_end.py",
    "cluster/test_joined.py",
    "test_earlier_version.py",
    "runs/test_execute.py",
    "test_entry_points.py",
    "lifecycle/test_side_by_side.py",
    "runs/test_cli.py",
    "viz/test_dashboard_in_kernels.py",
    "browser/test_lessons.py",
    "faults/test_interrupts.py",
    "faults/test_deaths.py",
    "checkpoint/test_checkpoint.py",
)
"""Files that start stacks or kernels of their own. Workers take files in order: with these at the
front none of them is alone at the end, and the shared session is seldom closed for one of them.
"""

PROMISED = ("test_true_on_policy.py",)
"""Files of which pages say that every change runs them: first of the slow cases where the time is
limited.
"""

FIRST = "first"
"""The snapshot of a shared session's first moment."""


class Shared:
    """The running session, started when first asked for and again after somebody closed it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.session: RLSession | None = None

    def at(self, seed: int) -> RLSession:
        """The session as it was in its first moment, with this seed."""
        if self.session and RLSession.current() is self.session and self.session.debug.stack.lost:
            self.session.close()  # a test that killed it has failed, which is its own affair
        if self.session is None or RLSession.current() is not self.session:
            os.environ.pop("KIT_RUN_DIR", None)
            with chdir(Path(__file__).parents[1]):  # whatever folder the first test is in
                self.session = RLSession.start("tiny")
            self.session.save(self.folder)
            self.session.snapshot(FIRST)
        reset(self.session, self.folder, seed)
        return self.session


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Holds the one session of the whole test run."""
    holder = Shared(tmp_path_factory.mktemp("shared") / "first")
    yield holder
    if holder.session:
        holder.session.close()


def pytest_configure(config: pytest.Config) -> None:
    """Say what the marks mean."""
    config.addinivalue_line("markers", "slow: one more case of a kind; only in `make test-all`")
    config.addinivalue_line("markers", "wider: goes through more cases in `make test-all`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not wanted, and put the longest files first.

    Last where the time is limited, so that it does for as many cases as can be.
    """
    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    here = Path(__file__).parent
    places = {here / name: place for place, name in enumerate(LONGEST_FIRST)}
    last = len(places)
    limited = math.isfinite(MINUTES)
    promised = {here / name for name in PROMISED} if limited else set()
    items[:] = sorted(
        filter(wanted, items),
        key=lambda item: (item.path in promised, places.get(item.path, last)),
        reverse=limited,
    )


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files; those of the engine, which share a process, to one of them."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scope: str = super()._split_scope(nodeid)
            return "engine" if scope.startswith("tests/engine/") else scope

    return Scheduler(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what does not fit into the time that there is."""
    if time.monotonic() - BEGAN > 60 * MINUTES:
        pytest.skip(f"the {MINUTES:g} minutes are over; `make test-all` takes the time it needs")


def pytest_sessionfinish() -> None:
    """End the stacks that tests have left warm for each other."""
    for entry in registry.living():
        registry.terminate(entry)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Say how long each notebook took that ran as a batch run, in whatever test."""
    ran: list[str] = []
    with suppress(FileNotFoundError):  # after an interrupt, folders may be removed meanwhile
        ran = notebook_times(Path(config._tmp_path_factory.getbasetemp()))
    if ran:
        terminalreporter.section("notebooks, as batch runs")
        for line in ran:
            terminalreporter.line(line)


@pytest.fixture
def session(shared: Shared) -> RLSession:
    """A running session in its first moment."""
    return shared.at(seed=0)


@pytest.fixture(scope="module")
def alone(shared: Shared) -> None:
    """No session in this process: for tests that start their own here."""
    if shared.session and RLSession.current() is shared.session:
        shared.session.close()


@pytest.fixture
def reseeded(shared: Shared) -> Callable[[int], RLSession]:
    """Gives the running session in its first moment, with another seed."""
    return shared.at


def reset(session: RLSession, first: Path, seed: int = 0) -> None:
    """Weights, optimizer, data, counters and randomness as at the start with this seed."""
    for name in session.debug.snapshots.keys() - {FIRST}:
        session.forget(name)
    session.debug.stack.trainers.newest_version = 0
    state, prompts = session.debug.state, session.debug.sampler.train
    state.stream = PromptStream(prompts, seed)  # a test may have put another
    session.restore(FIRST)
    session.debug.use(SessionConfig.load(first / checkpoint.CONFIG).replace("seed", seed))
    state.stream = PromptStream(prompts, seed)
