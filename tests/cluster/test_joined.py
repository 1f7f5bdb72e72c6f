"""A session on a Ray cluster that somebody else runs: joined, left as it was, and refused."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit import RLSession, SessionConfig
from kit.cluster import registry
from kit.errors import StackError
from tests.cases import some
from tests.conftest import Shared
from tests.processes import kill, of_engine, of_head
from tests.stack.test_devices import Devices, assert_close, learned

pytestmark = pytest.mark.slow  # a cluster of its own, which is a minute of a quiet machine

CORES = 8
PARTS = some(1, 2)
"""Trainers, and engines, of the session that shares devices; each takes half a minute to come."""


def settled(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture(scope="module")
def of_one(shared: Shared) -> list[dict[str, float]]:
    """What one trainer learns in its first step."""
    session = shared.at(seed=0)
    rows = learned(session, 1)
    session.close(keep_warm=True)
    return rows


@pytest.fixture(scope="module")
def cluster(
    of_one: list[dict[str, float]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """The address of a cluster with a token, which is in the environment meanwhile."""
    for entry in registry.living():  # those of other tests, which would only take memory
        registry.terminate(entry)
    before = dict(os.environ)
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16)}
    head, address = _started(tmp_path_factory.mktemp("cluster") / "log")
    try:
        yield address
    finally:
        _end(head)
        os.environ.clear()
        os.environ |= before


def _started(log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """The head, and its address. Ray gives a head half a minute, too little for a busy machine."""
    for _ in range(4):
        # Ray makes sockets below it, whose paths must not be long.
        folder = Path(f"/tmp/ray-{secrets.token_hex(4)}")
        head = subprocess.Popen(
            [
                *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"),
                *(f"--num-cpus={CORES}", "--port=0", "--include-dashboard=false"),
                *(f"--temp-dir={folder}", "--disable-usage-stats"),
            ],
            stdout=log.open("wb"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        address = folder / "ray_current_cluster"
        while not (told := _text(address)) and head.poll() is None:
            time.sleep(0.1)
        if told:
            return head, told
        _end(head)
    pytest.fail(log.read_text())


def _text(file: Path) -> str:
    return file.read_text().strip() if file.exists() else ""


def _end(head: Any) -> None:
    for process in [p for p in psutil.process_iter() if _session(p.pid) == head.pid]:
        process.send_signal(signal.SIGKILL)
    head.wait()
    folder = next(word for word in head.args if word.startswith("--temp-dir="))
    shutil.rmtree(folder.partition("=")[2], ignore_errors=True)


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def free(address: str) -> float:
    """Cores of the cluster that nobody has reserved, as a process of its own sees them."""
    script = (
        "import ray, sys, json; ray.init(sys.argv[1], logging_level='ERROR', log_to_driver=False); "
        "print(json.dumps(ray.available_resources().get('CPU', 0)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, address], capture_output=True, text=True, check=True
    )
    return float(json.loads(done.stdout.splitlines()[-1]))


def until_free(address: str, cores: float) -> None:
    deadline = time.monotonic() + 60
    while free(address) != cores:
        assert time.monotonic() < deadline


@pytest.mark.wider
def test_a_session_in_a_placement_group_learns_what_one_with_its_own_head_learns(
    cluster: str, of_one: list[dict[str, float]]
) -> None:
    token = os.environ["RAY_AUTH_TOKEN"]
    config = Devices(2, True, cluster).config
    config = config.replace("training.num_trainers", PARTS).replace("engine.replicas", PARTS)
    with RLSession.start(config) as session:
        assert_close(learned(session, 1), of_one)
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"
        assert free(cluster) == CORES - PARTS
        kill(of_engine(session, PARTS - 1))
        assert len(session.generate()) == 128
        members = session.debug.stack.cluster.processes()
        assert len(members) >= 4 * PARTS
    assert all(map(settled, members))
    assert os.environ["RAY_AUTH_TOKEN"] == token
    until_free(cluster, CORES)


def test_disaggregated_on_a_cluster_it_outlives_its_kernel_and_nothing_of_it_the_keeper(
    cluster: str, tmp_path: Path
) -> None:
    config = Devices(2, False, cluster).config.replace("name", "far")
    script = (
        "from kit import RLSession, SessionConfig; import os, sys, signal; "
        "session = RLSession.start(SessionConfig.load(sys.argv[1])); session.step(); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    file = config.dump(tmp_path / "config.yaml")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    subprocess.run([sys.executable, "-c", script, str(file)], env=environment, check=False)
    session = RLSession.attach("far")
    assert session.step_count == 1
    session.step()
    assert session.sync(verify=True).verified
    assert session.check_mismatch(session.generate()).verdict == "pass"
    assert free(cluster) == CORES - 4
    members = session.debug.stack.cluster.processes()
    kill(of_head(session, 0))
    with pytest.raises(StackError, match=r"RLSession\.load"):
        session.train(1000, show=False)
    session.close()
    assert all(map(settled, members))
    until_free(cluster, CORES)


def test_too_few_devices_are_told_with_how_many_are_free(cluster: str) -> None:
    config = Devices(2, False, cluster).config.replace("engine.replicas", 2 * CORES)
    with pytest.raises(
        StackError, match=rf"{2 + 2 * CORES} CPUs(.|\n)*{CORES} of {CORES} are free"
    ):
        RLSession.start(config)
    assert not [entry for entry in registry.living() if entry.address]


def test_another_token_is_told(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    with pytest.raises(StackError, match=r"cannot be joined(.|\n)*RAY_AUTH_TOKEN"):
        RLSession.start(Devices(2, True, cluster).config)


def test_where_there_is_no_cluster_it_is_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as one:
        port = one.getsockname()[1]
    config = SessionConfig.preset("tiny").replace("cluster.address", f"127.0.0.1:{port}")
    with pytest.raises(StackError, match=r"no Ray cluster at(.|\n)*ray start"):
        RLSession.start(config)
