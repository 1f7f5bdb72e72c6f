"""The running stack, seen from outside: who can reach it, and who can read it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from kit import RLSession
from kit.cluster import lease, processes, registry
from kit.cluster.client import killed_for_memory
from kit.errors import StackError
from tests.processes import named_memory


def test_everything_listens_on_loopback_only(session: RLSession) -> None:
    cluster = session.debug.stack.cluster
    listening = {
        connection.laddr.ip
        for process in processes.of_stack(cluster.stack, cluster.entry.head)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


def test_what_uses_ray_after_a_session_starts_no_other_one() -> None:
    """Although Ray was imported before the kit could tell it so."""
    program = """
import ray
ray.init = lambda **_: print("connects")
from kit.cluster.client import connect_ray
connect_ray("127.0.0.1:1", "kit", joins=False)
try:
    ray.put(1)
except Exception as error:
    print(error)
"""
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert run.stdout.count("connects") == 1, run.stdout + run.stderr
    assert "Ray has not been started yet" in run.stdout


def test_the_stack_lives_in_a_process_session_of_its_own(session: RLSession) -> None:
    head = session.debug.stack.cluster.entry.head
    assert os.getsid(head) == head != os.getsid(0)


@pytest.mark.slow
def test_another_token_is_refused(session: RLSession) -> None:
    script = """
import sys
from ray._raylet import GcsClient
print(GcsClient(address=sys.argv[1], cluster_id=None).get_all_node_info(timeout=10))
"""
    address = (session.debug.stack.cluster.directory / "address").read_text()
    for token, expected in ((session.debug.stack.cluster.entry.token, True), ("0" * 64, False)):
        env = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
        done = subprocess.run(
            [sys.executable, "-c", script, address], env=env, capture_output=True, timeout=120
        )
        assert (done.returncode == 0) is expected, done.stderr.decode()[-500:]


def test_only_the_owner_can_read_the_stacks_directory(session: RLSession) -> None:
    directory: Path = session.debug.stack.cluster.directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700


def test_only_the_owner_can_read_the_token_and_reach_the_control_socket(session: RLSession) -> None:
    cluster = session.debug.stack.cluster
    file = registry.folder() / f"{cluster.stack}.json"
    assert cluster.entry.token in file.read_text()
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (file.parent, file)]
    assert modes == [0o700, 0o600]
    assert stat.S_IMODE((cluster.directory / lease.SOCKET).stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_can_neither_read_the_token_nor_end_the_stack(session: RLSession) -> None:
    cluster = session.debug.stack.cluster
    file = registry.folder() / f"{cluster.stack}.json"
    script = """
import socket, sys
try:
    print("read", open(sys.argv[1]).read())
except PermissionError:
    print("refused")
try:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(sys.argv[2])
    connection.sendall(b'{"do": "end"}\\\\n')
    print("reached", connection.recv(100))
except PermissionError:
    print("refused")
try:
    print("seen", open(f"/proc/{sys.argv[3]}/environ", "rb").read())
except PermissionError:
    print("refused")
"""
    somebody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    arguments = [file, cluster.directory / lease.SOCKET, cluster.entry.head]
    python = os.path.realpath(sys.executable)
    done = subprocess.run(
        [*somebody, python, "-I", "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd="/",
    )
    assert done.stdout.split() == ["refused"] * 3, done.stdout + done.stderr
    assert session.generate(["1+1="])


TRIES = """
import json, os, socket, sys
sockets, memory = json.load(sys.stdin)
for name in sockets:
    try:
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.connect(name)
        print("connected to", name)
    except PermissionError:
        continue
for name in memory:
    try:
        os.close(os.open(name, os.O_RDONLY))
        print("opened", name)
    except PermissionError:
        continue
print("tried", len(sockets), len(memory))
"""


def sockets_and_memory(session: RLSession) -> tuple[set[str], set[str]]:
    """Names of the Unix sockets on which a session listens, and of the memory that its processes
    share, or map. An abstract socket, which has no owner, begins with a null byte.
    """
    rows = Path("/proc/net/unix").read_text().splitlines()[1:]
    listening = {row.split()[6]: row.split()[7] for row in rows if row.split()[3] == "00010000"}
    sockets, memory = set(), set()
    for process in [psutil.Process(), *session.debug.stack.cluster.processes()]:
        memory |= {f"/proc/{process.pid}/mem", f"/proc/{process.pid}/maps"}
        memory |= {f"/dev/shm/{name}" for name in named_memory(process.pid)}
        memory |= set(processes.semaphores(process.pid))
        for fd in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(OSError):
                target = os.readlink(fd)
                if target.startswith("socket:[") and target[8:-1] in listening:
                    sockets.add(listening[target[8:-1]].replace("@", "\0", 1))
                elif target.startswith(("/dev/shm", "/memfd")) or target.endswith(".shm"):
                    memory.add(str(fd))
    return sockets, memory


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_can_connect_to_no_socket_and_read_no_shared_memory(
    session: RLSession,
) -> None:
    session.sync()
    sockets, memory = sockets_and_memory(session)
    directory = str(session.debug.stack.cluster.directory)
    inside = {name for name in sockets if name.startswith(directory)}
    assert len(inside) >= 8, sockets  # the lease's, the fork server's, Ray's two, SGLang's
    assert any("kit-weights" in os.readlink(name) for name in memory if "/fd/" in name)
    done = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
         os.path.realpath(sys.executable), "-I", "-c", TRIES],
        input=json.dumps([sorted(sockets), sorted(memory)]),
        capture_output=True, text=True, timeout=60, cwd="/",
    )  # fmt: skip
    assert done.stdout.split() == ["tried", str(len(sockets)), str(len(memory))], done


def test_there_is_no_dashboard_and_no_http_server_of_the_engine(session: RLSession) -> None:
    cluster = session.debug.stack.cluster
    commands = [
        " ".join(process.cmdline())
        for process in processes.of_stack(cluster.stack, cluster.entry.head)
    ]
    assert any("raylet" in command for command in commands)
    assert not [command for command in commands if "dashboard/dashboard.py" in command]
    assert not [command for command in commands if "launch_server" in command]


def test_a_stack_is_not_taken_while_it_is_driven(session: RLSession) -> None:
    cluster = session.debug.stack.cluster
    with pytest.raises(StackError, match=f"Process {os.getpid()} drives this stack"):
        lease.own(cluster.directory)
    state = lease.state_of(cluster.directory)
    assert state is not None
    assert state["driver"] == os.getpid()


def test_a_number_that_another_process_has_by_now_is_not_taken_for_a_head(tmp_path: Path) -> None:
    here = registry.new("0" * 16, os.getpid(), tmp_path, "token", name="x", device="cpu")
    assert here.alive
    later = replace(here, head_started=f"{here.head_started}1")
    registry.write(later)
    assert later.stack not in {entry.stack for entry in registry.living()}
    assert not (registry.folder() / f"{later.stack}.json").exists()


def test_what_ray_kills_for_memory_is_told_from_its_log() -> None:
    """Lines of a raylet of Ray 2.60, made with `RAY_memory_usage_threshold=0.075`."""
    place = "[2026-12-01 02:26:23,217 I 499 545] (raylet) threshold_memory_monitor.cc:128: "
    full = "Node memory usage above threshold, used: {}, threshold_bytes: 1895704576, {}"
    total = "total bytes: 25276059648, threshold fraction: 0.075000"
    killed = "Selected to kill: (Task: job ID=01000000, lease ID=010, {}"
    lines = [
        place + full.format(1978974208, total),
        killed.format("task name=engine-1:Engine.__init__, required resources={}, pid=713"),
        place + full.format(2093338624, total),
        killed.format("task name=trainer-0:Trainer.__init__, required resources={}, pid=763"),
        place + full.format(2000000000, total),
    ]
    told = killed_for_memory(lines, "trainer")
    assert "Ray killed it for memory: 1.9 of the machine's 23.5 GiB" in told
    assert "1.8 of the machine's 23.5 GiB" in killed_for_memory(lines, "engine")
    assert killed_for_memory(lines[:3], "trainer") == ""
