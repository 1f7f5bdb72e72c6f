"""Kernels that are killed, and the sessions that they leave: found again, or gone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jupyter_client import KernelManager

from kit import RLSession
from kit.cluster import registry
from kit.errors import SessionError
from tests.cases import some
from tests.lifecycle import killed_kernel
from tests.processes import assert_gone, leave_only

ROOT = Path(__file__).parents[2]
MOMENTS = some(
    ("score",),
    ("score", "update", "sync", "engine", "restart", "by hand", "generate"),
)


def kernel(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a kernel of `tests/lifecycle/killed_kernel.py` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "tests.lifecycle.killed_kernel", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def python(code: str) -> str:
    """What another process says, its errors included."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def survived() -> list[Any]:
    """What a session is whose kernels were killed at every moment, and what its lists showed."""
    leave_only(RLSession.current())
    seen: list[Any] = []
    name: tuple[str, ...] = ()
    for moment in MOMENTS:
        done = kernel(moment, *name)
        assert done.returncode == -signal.SIGKILL, done.stderr
        seen.append(RLSession.sessions())
        name = ("dying",)
    (entry,) = registry.living()
    done = kernel("never", *name)
    assert done.returncode == 0, done.stderr
    return [json.loads(done.stdout.splitlines()[-1]), seen, entry]


@pytest.mark.slow
@pytest.mark.wider
def test_kernels_killed_at_every_moment_leave_a_session_that_trains_as_if_none_had_died(
    survived: list[Any],
) -> None:
    """In a reward function, during an update, between update and sync, with both engines dead,
    while they are started again, after an update by hand, while responses are written: metrics,
    weights, data and last rollout are those of one unbroken kernel. So are they after going back to
    a snapshot that the first of the kernels took.
    """
    after, undone = survived[0]
    with RLSession.start(killed_kernel.configuration(), reward=dying_reward) as session:
        session.step()
        session.snapshot(killed_kernel.KEPT)
        session.train(after["step"] - 1, show=False)
        unbroken, back = json.loads(
            json.dumps([killed_kernel.told(session), killed_kernel.undone(session)])
        )
    assert undone == back
    assert after["step"] >= len(MOMENTS) + 1
    assert after["history"] == unbroken["history"]
    assert after["weights"] == unbroken["weights"]
    assert after == unbroken


def dying_reward(sample: Any) -> float:
    """That of `tests.lifecycle.killed_kernel`."""
    return float(sample.response == sample.label)


def test_a_session_without_a_kernel_is_listed_with_its_step_and_the_time_that_it_waits(
    survived: list[Any],
) -> None:
    for (found,) in survived[1]:
        assert (found.name, found.driver, found.device) == ("dying", None, "cpu")
        assert found.can_be_attached
        assert 0 < found.ends_in <= 300
        assert found.step >= 1
        assert found.memory > 0
    shown = str(survived[1][0])
    assert "nobody, ends in" in shown
    assert "RLSession.attach('dying')" in shown


def test_a_session_that_was_attached_leaves_nothing_when_it_is_closed(survived: list[Any]) -> None:
    entry = survived[2]
    assert_gone(entry.head, entry.directory)
    assert entry.stack not in {other.stack for other in registry.living()}


@pytest.mark.slow
def test_a_kernel_that_jupyter_restarts_keeps_its_session_and_one_that_it_shuts_down_does_not() -> (
    None
):
    leave_only(RLSession.current())
    manager = KernelManager(shutdown_wait_time=120.0)  # else it is killed while it ends
    manager.start_kernel(cwd=str(ROOT), env=os.environ | {"PYTHONPATH": str(ROOT)})
    try:
        say(manager, "from kit import RLSession; s = RLSession.start('tiny'); s.step()")
        (before,) = RLSession.sessions().sessions
        manager.restart_kernel()
        (waiting,) = RLSession.sessions().sessions
        assert (waiting.id, waiting.step, waiting.driver) == (before.id, 1, None)
        said = say(manager, "from kit import RLSession; s = RLSession.attach(); s.step().step")
        assert said == "1"
        (again,) = RLSession.sessions().sessions
        assert (again.id, again.driver) == (before.id, manager.provisioner.pid)
        (entry,) = registry.living()
        # A kernel that takes long to end is killed by Jupyter.
        slow = "import time; RLSession.current().debug.stack.close = lambda: time.sleep(600)"
        say(manager, slow)
        manager.shutdown_wait_time = 10.0
    finally:
        manager.shutdown_kernel()
    assert_gone(entry.head, entry.directory)
    assert len(RLSession.sessions()) == 0


def say(manager: KernelManager, code: str) -> str:
    """Run a cell; the text of its result."""
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        shown: list[str] = []

        def hear(message: dict[str, Any]) -> None:
            if message["msg_type"] in ("error", "execute_result"):
                content = message["content"]
                shown.append(content["data"]["text/plain"] if "data" in content else str(content))

        client.execute_interactive(code, output_hook=hear, timeout=300)
        return "".join(shown)
    finally:
        client.stop_channels()


@pytest.mark.slow
def test_attaching_to_a_session_that_is_driven_is_refused_with_its_process(
    session: RLSession,
) -> None:
    name = session.config.name
    said = python(f"from kit import RLSession; RLSession.attach({name!r})")
    assert f"driven by process {os.getpid()}, which lives" in said
    assert f"kit doctor --stop {name}" in said
    assert session.step().metrics


def test_the_list_shows_who_drives_a_session(session: RLSession) -> None:
    said = python("from kit import RLSession; print(RLSession.sessions())")
    assert f"process {os.getpid()}, in {os.getcwd()}" in said
    assert "(this one)" in str(RLSession.sessions())


def test_a_process_that_has_a_session_gets_it_back(session: RLSession) -> None:
    assert RLSession.attach(session.config.name) is session
    with pytest.raises(SessionError, match=r"(?s)in this process already.*RLSession\.current"):
        RLSession.attach(session.config.name, reward=lambda sample: 1.0)


def test_a_session_that_is_not_there_is_named_with_those_that_are(session: RLSession) -> None:
    said = python("from kit import RLSession; RLSession.attach('tinny')")
    assert f"Did you mean {session.config.name!r}" in said
