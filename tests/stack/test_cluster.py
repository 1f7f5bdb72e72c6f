"""The running stack, seen from outside: who can reach it, and who can read it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import psutil

from kit import RLSession
from kit.stack import processes


def test_everything_listens_on_loopback_only(session: RLSession) -> None:
    cluster = session._running.cluster
    listening = {
        connection.laddr.ip
        for process in processes.of_stack(cluster.stack, cluster._head.pid)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_the_stack_lives_in_a_process_session_of_its_own(session: RLSession) -> None:
    head = session._running.cluster._head.pid
    assert os.getsid(head) == head != os.getsid(0)


def test_another_token_is_refused(session: RLSession) -> None:
    script = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1], cluster_id=None).get_all_node_info(timeout=10))
"""
    address = (session._running.cluster.directory / "address").read_text()
    for token, expected in ((session._running.cluster._token, True), ("0" * 64, False)):
        env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = subprocess.run(
            [sys.executable, "-c", script, address], env=env, capture_output=True, timeout=120
        )
        assert (done.returncode == 0) is expected, done.stderr.decode()[-500:]


def test_only_the_owner_can_read_the_stacks_directory(session: RLSession) -> None:
    directory: Path = session._running.cluster.directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
