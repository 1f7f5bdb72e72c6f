"""Strangers who connect to the ports of a session's processes, and do not know its token."""

from __future__ import annotations

import random
import socket
import urllib.error
import urllib.request
from contextlib import suppress

import grpc
import psutil
import pytest

from kit import RLSession
from kit.cluster.processes import engine
from tests.cases import some
from tests.faults.interrupts import digests
from tests.processes import SCHEDULER
from tests.steps import responses_and_metrics

GREETINGS = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(64),
    b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" + b"\xff" * 64,  # as ZeroMQ begins
    b"\x16\x03\x01\x02\x00" + b"\x01" * 512,  # as TLS begins
    b"\xff" * 4096,
    bytes(4096),
)
"""Beginnings of protocols, and lengths and numbers that cannot be."""


def ports(session: RLSession) -> list[tuple[str, str, int]]:
    """(process, address, port) of each port on which the stack or this process listens."""
    stack = session.debug.stack.cluster
    found = []
    for process in [psutil.Process(), *stack.processes()]:
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                found.append((process.name(), connection.laddr.ip, connection.laddr.port))
    return sorted(set(found))


def pester(address: str, port: int, noise: random.Random) -> socket.socket | None:
    """Send a port what is no call of it; returns a connection that stays open in its midst."""
    kind = socket.AF_INET6 if ":" in address else socket.AF_INET
    for words in (*GREETINGS, noise.randbytes(20_000)):
        with suppress(OSError), socket.socket(kind) as stranger:
            stranger.settimeout(5)
            stranger.connect((address, port))
            stranger.sendall(words)
            stranger.shutdown(socket.SHUT_WR)
            stranger.setblocking(False)
            stranger.recv(1 << 16)
    left = socket.socket(kind)
    with suppress(OSError):
        left.settimeout(5)
        left.connect((address, port))
        left.sendall(noise.randbytes(7))
        return left
    left.close()
    return None


CALLS = (
    "CoreWorkerService/GetCoreWorkerStats",
    "NodeManagerService/GetNodeStats",
    "ObjectManagerService/Pull",
    "NodeInfoGcsService/GetAllNodeInfo",
)
"""One call of each of Ray's services; each port has one of them."""


def without_token(port: int) -> set[str]:
    """What a port answers to calls that bring no token."""
    said = set()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for name in CALLS:
            try:
                channel.unary_unary(f"/ray.rpc.{name}")(b"", timeout=20)
                said.add("OK")
            except grpc.RpcError as error:
                said.add(error.code().name)
    return said


def test_a_port_is_behind_the_token_or_one_of_gloo(session: RLSession) -> None:
    stack, mine = session.debug.stack.cluster, psutil.Process()
    by_gloo = set()
    for process in [mine, *stack.processes()]:
        for connection in process.net_connections("inet"):
            port, address = connection.laddr.port, connection.laddr.ip
            if connection.status != psutil.CONN_LISTEN:
                continue
            if process.name() == "ray::RuntimeEnvAgent":
                with pytest.raises(urllib.error.HTTPError, match="401"):
                    urllib.request.urlopen(f"http://{address}:{port}/", data=b"")
            elif address.startswith("::ffff:"):  # as Ray's own listen
                assert without_token(port) == {"UNAUTHENTICATED", "UNIMPLEMENTED"}
            elif process != mine:
                by_gloo.add(process.pid)
    watch = session.debug.stack.watch
    assert by_gloo == {
        watch.members("trainer")[0].pid,
        *(
            watch.members(engine(i))[SCHEDULER].pid
            for i in range(session.debug.stack.layout.replicas)
        ),
    }


def test_garbage_on_every_port_leaves_the_next_step_what_it_would_have_been(
    session: RLSession,
) -> None:
    session.snapshot("before")
    expected = responses_and_metrics([session.step()])
    weights = digests(session)
    session.restore("before")
    watch, noise = session.debug.stack.watch, random.Random(0)
    members = {part: watch.members(part) for part in ("head", "trainer", "engine 0", "engine 1")}
    listening = ports(session)
    assert {name for name, _, _ in listening} >= {"gcs_server", "raylet"}
    opened = [
        pester(address, port, noise) for _ in range(some(1, 20)) for _, address, port in listening
    ]
    assert responses_and_metrics([session.step()]) == expected
    assert digests(session) == weights
    for connection in opened:
        if connection:
            connection.close()
    assert not watch.dead()
    assert {part: watch.members(part) for part in members} == members
    assert all(process.is_running() for part in members.values() for process in part)
