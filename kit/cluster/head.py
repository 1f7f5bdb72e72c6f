"""The stack's head process: starts Ray in a process session of its own.

`Cluster` starts it as `python -m kit.cluster.head`. It starts Ray's control service and raylet (no
dashboard, no log monitor, no autoscaler: each is another interpreter to start), writes the address
to DIRECTORY/address, and hears on DIRECTORY/control who drives the stack, as `lease.py` says. When
it is told to end, or nobody has driven it for as long as its lease, it takes the stack down.

Everything listens on the loopback interface only. Ray's own `ray start` gives that up, because
it is made for clusters; hence Ray's private `Node` is used directly. What else is private, as read
from Ray 2.60.0 (`client.py` lists what a driver takes from Ray in this way):

    node.Node(...), Node.start_api_server, Node.start_log_monitor     started for any head
    parameter.RayParams(...)                        its fields are checked by no released interface
    services.get_node                               waits 30 s for the raylet
    services.start_ray_process                      the command line of the raylet
    workers/setup_worker.py, setup_worker_path      what a raylet runs as a worker
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from kit.cluster import fork_server, lean_imports, processes, registry
from kit.cluster.lease import Control
from kit.utils.files import replace_file

RAYLET_SECONDS = 300.0
"""How long the raylet may take to start; the client's own limit is engine.start_timeout."""
OBJECT_STORE_BYTES = 512 * 2**20
"""Rollouts and batches pass through here; weights do not."""


def start_ray(directory: Path, *, gpus: int, fork_workers: bool) -> Any:
    """Start Ray's two processes, and return the running node."""
    from ray._private import services
    from ray._private.node import Node
    from ray._private.parameter import RayParams

    services.get_node = retrying(services.get_node)

    class LeanNode(Node):
        """Ray head without the HTTP server that Ray starts even when no dashboard is wanted."""

        def start_api_server(self, **_: Any) -> None:
            pass

        def start_log_monitor(self) -> None:
            pass

    settings: dict[str, Any] = {}
    if fork_workers:
        import ray._private.workers as workers

        os.environ["KIT_RAY_SETUP_WORKER"] = str(Path(workers.__file__).parent / "setup_worker.py")
        settings["setup_worker_path"] = str(Path(fork_server.__file__).with_name("worker_stub.py"))
    ports = free_ports(4)
    services.start_ray_process = naming_port(services.start_ray_process, ports[3])
    params = RayParams(
        num_cpus=64,  # actors share the machine; Ray's bookkeeping of cores is not wanted
        num_gpus=gpus,
        node_ip_address="127.0.0.1",
        include_dashboard=False,
        include_log_monitor=False,
        no_monitor=True,
        temp_dir=str(directory / "ray"),
        object_store_memory=OBJECT_STORE_BYTES,
        gcs_server_port=0,
        env_vars={},
        # Where a port is left open, the raylet waits 15 s for an agent, a Python process, to start
        # and choose one, and dies after that: too short for a busy machine. See `naming_port`.
        runtime_env_agent_port=ports[0],
        metrics_agent_port=ports[1],
        metrics_export_port=ports[2],
        dashboard_agent_listen_port=ports[3],
        **settings,
    )
    return LeanNode(
        params, head=True, shutdown_at_exit=False, spawn_reaper=False, ray_init_cluster=False
    )


def naming_port(start: Callable[..., Any], port: int) -> Callable[..., Any]:
    """Wrap `start` to tell the raylet its agent's port; Ray tells the agent only."""

    def start_process(command: list[str], process_type: str, *args: Any, **kwargs: Any) -> Any:
        if process_type == "raylet":
            command = [*command, f"--dashboard_agent_listen_port={port}"]
        return start(command, process_type, *args, **kwargs)

    return start_process


def retrying(get_node: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `get_node` to ask until the raylet is up: a busy machine can exceed Ray's 30 s."""

    def ask(*args: Any) -> Any:
        deadline = time.monotonic() + RAYLET_SECONDS
        while True:
            try:
                return get_node(*args)
            except RuntimeError:
                if time.monotonic() > deadline or raylet_died():
                    raise
                time.sleep(0.05)

    return ask


def raylet_died() -> bool:
    """Whether this process has a raylet that has ended."""
    children = psutil.Process().children()
    return any(c.name() == "raylet" and c.status() == psutil.STATUS_ZOMBIE for c in children)


def free_ports(count: int) -> list[int]:
    """Find loopback ports that are free now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


def start_head(directory: Path, *, device: str, gpus: int) -> None:
    """Start Ray, and on a CPU the fork server of its workers; then write the address."""
    if device == "cpu":
        with (directory / "zygote.log").open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "kit.cluster.fork_server"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
    node = start_ray(directory, gpus=gpus, fork_workers=device == "cpu")
    replace_file(directory / "address", node.gcs_address)


def main(
    directory: Path,
    listener: socket.socket,
    *,
    device: str,
    gpus: int,
    wanted: dict[str, Any] | None = None,
) -> None:
    """Start everything, wait for the end of the lease, and end everything.

    Args:
        directory: the stack's.
        listener: its control socket.
        device: `cpu` or `cuda`.
        gpus: how many Ray is told of.
        wanted: of another Ray cluster, instead of starting one; see `joined.py`.
    """
    stack = os.environ[processes.MARK]
    control = Control(listener)
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())

    def serve() -> None:
        try:
            control.serve()
        finally:
            ended.set()

    threading.Thread(target=serve, daemon=True).start()
    started = False
    give_back: Callable[[], None] | None = None
    try:
        if wanted:
            from kit.cluster.joined import hold

            give_back = hold(directory, stack, device, wanted)
        else:
            start_head(directory, device=device, gpus=gpus)
        started = True
        ended.wait()
    finally:
        if give_back:
            with contextlib.suppress(Exception):
                give_back()
        # Not Ray's graceful end: that drains the node for half a minute. Nothing here needs it.
        processes.end(processes.of_stack(stack, os.getpid()))
        if started or control.driver is None:  # else the client reads our log
            shutil.rmtree(directory, ignore_errors=True)
        registry.forget(stack)


if __name__ == "__main__":
    joins = json.loads(sys.argv[5]) if len(sys.argv) > 5 else None
    if not joins:
        lean_imports.leave_out()
    main(
        Path(sys.argv[1]),
        socket.socket(fileno=int(sys.argv[2])),
        device=sys.argv[3],
        gpus=int(sys.argv[4]),
        wanted=joins,
    )
