"""Let SGLang start its scheduler and detokenizer as forks of the zygote.

SGLang starts them through `multiprocessing` with the spawn method: a new interpreter each, and all
its imports again. Here its `multiprocessing` is one whose fork server the zygote has forked.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from multiprocessing import forkserver, resource_tracker
from typing import Any

from kit.stack.cpu import zygote


class ForkedByZygote:
    """Stands for the module `multiprocessing` in SGLang's engine module."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")

    def set_start_method(self, method: str, force: bool = False) -> None:
        """SGLang asks for spawn; the fork server takes its place."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def use_zygote() -> int:
    """Point this process' `multiprocessing` fork server, and SGLang's engine, at the zygote.

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
    answer = zygote.ask(request, [listener.fileno(), alive_read])
    pid = int.from_bytes(answer.recv(8), "big")
    os.close(alive_read)
    server: Any = forkserver._forkserver
    server._forkserver_address = address
    server._forkserver_alive_fd = alive_write  # closing it, or our death, ends the fork server
    server._forkserver_pid = pid
    server.ensure_running = resource_tracker.ensure_running  # its own check waits for a child
    engine_module.mp = ForkedByZygote()
    return pid
