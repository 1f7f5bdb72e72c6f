"""Fork server: one process imports everything; Ray workers and SGLang's processes are its forks.

Ray starts each worker as a new interpreter and SGLang starts two more, and each of them would spend
ten seconds and more on the same imports. Here the imports are done once, next to Ray's own start,
and every one of those processes is a fork that begins with them done.

                  raylet ── starts ──► worker_stub.py ── asks over a socket ──┐
      engine actor ── asks for a multiprocessing fork server ─────────────────┤
                                                                              ▼
                                            zygote: imports, then forks ──► worker, scheduler, ...

Only for the CPU: importing SGLang beside a GPU may initialise CUDA, which does not survive a fork.

SGLang starts its scheduler and detokenizer through `multiprocessing` with the spawn method: a new
interpreter each, and all its imports again. `use_zygote` gives it a `multiprocessing` whose fork
server the zygote has forked.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import traceback
from multiprocessing import forkserver, resource_tracker
from typing import Any

from kit.utils.imports import without_garbage_collection

SOCKET_ENV = "KIT_ZYGOTE_SOCKET"
PRELOAD = (
    # Not Ray: it reads which worker it is from the environment at the time it is imported.
    "google.protobuf.message",
    "aiohttp",
    "jsonschema",
    "msgpack",
    "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "sglang.srt.entrypoints.engine",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.detokenizer_manager",
    "kit.engine.cpu.attention",
    "kit.engine.actor",
    "kit.trainer.actor",
)


def ask(request: dict[str, Any], fds: list[int]) -> socket.socket:
    """Send one request with its open files; the socket closes when the fork ends.

    Raises OSError where no zygote listens.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(os.environ[SOCKET_ENV])
    payload = json.dumps(request).encode()
    socket.send_fds(connection, [len(payload).to_bytes(4, "big")], fds)
    connection.sendall(payload)
    return connection


def serve(path: str) -> None:
    """Import everything, then fork on request, until killed."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(path)
    listener.listen(64)
    preload()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps what we fork
    gc.freeze()
    while True:
        connection, _ = listener.accept()
        if os.fork():
            connection.close()
            continue
        listener.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _run(connection)


def preload() -> None:
    """Import everything that a start needs; Python keeps it compiled for the next start."""
    from kit.cluster.lean_imports import leave_out

    leave_out()
    with without_garbage_collection():
        for module in PRELOAD:
            importlib.import_module(module)


def _run(connection: socket.socket) -> None:
    """Become the requested process, in the fork. Never returns."""
    try:
        header, fds, _, _ = socket.recv_fds(connection, 4, 8)
        size = int.from_bytes(header, "big")
        payload = b""
        while len(payload) < size:
            payload += connection.recv(size - len(payload))
        request = json.loads(payload)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        if request["kind"] == "script":
            _become_script(request["argv"], fds)
        else:
            _become_fork_server(fds, connection)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        _leave(code)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    _leave(0)


def _leave(code: int) -> None:
    """Run a normal interpreter's exit handlers, without returning into the server's loop."""
    import atexit

    try:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _become_script(argv: list[str], fds: list[int]) -> None:
    for target, fd in enumerate(fds):
        os.dup2(fd, target)
        os.close(fd)
    sys.argv[:] = argv
    runpy.run_path(argv[0], run_name="__main__")


def _become_fork_server(fds: list[int], connection: socket.socket) -> None:
    """Serve `multiprocessing`'s forkserver protocol; what it forks has the imports done."""
    listener, alive = fds
    connection.sendall(os.getpid().to_bytes(8, "big"))
    forkserver.main(listener, alive, preload=[])


class ForkedByZygote:
    """Replaces the module `multiprocessing` in SGLang's engine module."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")

    def set_start_method(self, method: str, force: bool = False) -> None:
        """Use the fork server where SGLang asks for spawn."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def use_zygote() -> int:
    """Make this process' `multiprocessing` and SGLang's engine fork from the fork server.

    Returns the fork server's process id.
    """
    import sglang.srt.entrypoints.engine as engine_module

    address = os.path.join(tempfile.mkdtemp(prefix="fork"), "s")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    os.chmod(address, 0o600)
    listener.listen()
    alive_read, alive_write = os.pipe()
    request = {"kind": "forkserver", "env": dict(os.environ), "cwd": os.getcwd()}
    answer = ask(request, [listener.fileno(), alive_read])
    pid = int.from_bytes(answer.recv(8), "big")
    os.close(alive_read)
    server: Any = forkserver._forkserver
    server._forkserver_address = address
    server._forkserver_alive_fd = alive_write  # closing it, or our death, ends the fork server
    server._forkserver_pid = pid
    server.ensure_running = resource_tracker.ensure_running  # its own check waits for a child
    engine_module.mp = ForkedByZygote()
    return pid


if __name__ == "__main__":
    serve(os.environ[SOCKET_ENV])
