"""Several sessions on one machine: names, shares, who is refused, and who is ended from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig
from kit.cluster import lease, registry
from kit.doctor import stacks
from kit.errors import SessionError
from kit.lifecycle import acquire
from kit.models.source import find
from kit.stack.stack import Stack
from kit.utils.hardware import GIB, Card
from tests.processes import alive, assert_gone

ROOT = Path(__file__).parents[2]
SESSION = """
from kit import RLSession, SessionConfig
session = RLSession.start(SessionConfig.preset("tiny"))
session.step()
cluster = session.debug.stack.cluster
print(session.config.name, cluster.entry.head, cluster.directory, flush=True)
input()
"""


@contextmanager
def notebook(code: str = SESSION) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """Another process with a session, and what it said when that ran."""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_two_notebooks_run_the_same_preset_under_names_of_their_own_and_one_is_stopped_by_name(
    session: RLSession,
) -> None:
    own = session.debug.stack.cluster
    with notebook() as (process, (name, head, directory)):
        assert (session.config.name, name) == ("tiny", "tiny-2")
        listed = {each.name: each.driver for each in RLSession.sessions().sessions}
        assert listed == {"tiny": os.getpid(), "tiny-2": process.pid}
        assert session.step().metrics
        assert "Ended the session 'tiny-2'" in stacks.stop("tiny-2")
        assert_gone(int(head), directory)
    assert alive(own.entry.head, str(own.directory))
    assert session.step().metrics


@pytest.fixture
def own_tmp(session: RLSession, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A short folder for temporary files, in which there are no leftovers but this test's.

    The shared session is there before: its files must outlive this folder.
    """
    assert session
    with tempfile.TemporaryDirectory(prefix="t-") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        monkeypatch.setenv("TMPDIR", folder)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("own_tmp")
def test_what_killed_heads_leave_is_found_and_stopped_and_nothing_else_is(
    session: RLSession,
) -> None:
    own = session.debug.stack.cluster
    with notebook() as (process, (_, head, directory)):
        process.kill()
        process.wait()
        os.kill(int(head), signal.SIGKILL)
        assert alive(int(head), directory)
        found = [f for f in stacks.findings(stacks.living()) if f.name == stacks.LEFTOVERS]
        assert Path(directory).name in found[0].found
        assert "still run" in found[0].found
        assert "Removed" in stacks.stop(stacks.LEFTOVERS)
        assert_gone(int(head), directory)
    assert alive(own.entry.head, str(own.directory))
    assert session.step().metrics


def test_there_is_nothing_to_stop_under_a_name_that_nobody_has(session: RLSession) -> None:
    with pytest.raises(SessionError, match=r"no session 'tinny' of yours(.|\n)*'tiny'"):
        stacks.stop("tinny")


def test_a_name_of_ones_own_is_refused_while_another_session_has_it(session: RLSession) -> None:
    cluster = session.debug.stack.cluster
    cluster.ready(300, name="mine")
    try:
        code = "RLSession.start(SessionConfig.preset('tiny').replace('name', 'mine'))"
        said = subprocess.run(
            [sys.executable, "-c", f"from kit import RLSession, SessionConfig\n{code}"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        ).stderr
    finally:
        cluster.ready(300, name=session.config.name)
    assert "There is a session 'mine' already." in said
    assert f"Process {os.getpid()} drives 'mine', from {os.getcwd()}" in said
    assert "kit doctor --stop mine" in said


# ---- one GPU ------------------------------------------------------------------------------------


def start_beside(session: RLSession, theirs: float | None, ours: float | None) -> None:
    """What a start on the GPU does that this session would hold with so many GiB."""
    entry = replace(session.debug.stack.cluster.entry, device="cuda", device_gib=theirs)
    settings: dict[str, Any] = {"memory": {"device_gib": ours}}
    config = SessionConfig(name="second", **settings)
    stack = Stack(config, find(config.model), "cuda", 8, session.debug.stack.plan)
    acquire.make_room(stack, [(entry, lease.state_of(entry.folder))], set())


@pytest.mark.parametrize(
    ("theirs", "ours", "says"),
    [
        (None, None, "its session has all of it"),
        (None, 1.0, "its session has all of it"),
        (2.0, None, "it has 2 GiB"),
        (2.0, 1e6, "The shares of all sessions would be"),
    ],
)
def test_a_second_session_on_a_gpu_is_refused_with_the_owner_and_the_ways_out(
    session: RLSession, theirs: float | None, ours: float | None, says: str
) -> None:
    with pytest.raises(SessionError) as refused:
        start_beside(session, theirs, ours)
    said = str(refused.value)
    assert says in said
    assert f"Process {os.getpid()} drives 'tiny', from {os.getcwd()}" in said
    assert "session.close()" in said
    assert "kit doctor --stop tiny" in said
    assert "memory.device_gib" in said


def test_sessions_share_a_gpu_where_each_was_given_its_part(session: RLSession) -> None:
    half = (Card.gpu() or Card.host()).total / GIB / 2
    start_beside(session, half * 0.9, half)
    assert registry.living()
