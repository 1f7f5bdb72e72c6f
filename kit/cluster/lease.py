"""The lease: the head's control socket, and a client's connection, which make it a stack's driver.

    client  ── connects to DIRECTORY/control, says `own` ──►  head
            ── stays connected: it drives the stack ─────────
            ── says `end` ──────────────────────────────────►  everything ends
            ── says `leave` ────────────────────────────────►  nobody drives it for so long
            ── is gone without a word (killed, restarted) ──►  the lease begins

A stack has one driver at a time. While it has none, a clock runs, and at its end the head takes the
stack down; whoever says `own` before that stops it. The socket lies in the stack's directory, which
only its owner may enter. One JSON object a line, in both directions.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import StackError
from kit.utils.files import working_folder

SOCKET = "control"
FIRST_SECONDS = 60.0
"""How long a head waits for its first driver."""
ANSWER_SECONDS = 10.0


def listen(directory: Path) -> socket.socket:
    """Open the head's control socket; connections wait there until the head serves."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(directory / SOCKET))
    os.chmod(directory / SOCKET, 0o600)
    listener.listen(16)
    return listener


@dataclass(slots=True)
class Client:
    """A client's connection, as the head sees it."""

    socket: socket.socket
    pid: int
    heard: bytes = b""


@dataclass(slots=True)
class Control:
    """The head's side of the lease. `serve` returns when the stack is to end."""

    listener: socket.socket
    lease: float = 0.0
    """Seconds that the stack outlives a driver who goes without a word; 0 until it has started."""
    driver: Client | None = None
    folder: str = ""
    """Working directory of the driver."""
    warm: bool = False
    """Whether the driver left it to be reset by the next start, and was not lost."""
    _deadline: float = field(default_factory=lambda: time.monotonic() + FIRST_SECONDS)
    _ending: bool = False
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _watch: int = -1

    def serve(self) -> None:
        """Serve all clients until one says `end`, or the lease has run out."""
        self._selector.register(self.listener, selectors.EVENT_READ, self._accept)
        while not self._ending:
            left = None if self.driver else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            for key, _ in self._selector.select(left):
                if key.fd in self._selector.get_map():  # one before it may have closed it
                    key.data()

    def _accept(self) -> None:
        connection, _ = self.listener.accept()
        connection.settimeout(ANSWER_SECONDS)
        size = struct.calcsize("3i")
        pid, _, _ = struct.unpack(
            "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
        )
        client = Client(connection, pid)
        self._selector.register(connection, selectors.EVENT_READ, lambda: self._hear(client))

    def _hear(self, client: Client) -> None:
        try:
            data = client.socket.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._gone(client)
            return
        *lines, client.heard = (client.heard + data).split(b"\n")
        for line in lines:
            answer = self._answer(client, json.loads(line))
            with contextlib.suppress(OSError):  # it may be gone already
                client.socket.sendall(json.dumps(answer).encode() + b"\n")

    def _answer(self, client: Client, said: dict[str, Any]) -> dict[str, Any]:
        what, seconds = said["do"], float(said.get("seconds", 0.0))
        if what == "ask":
            return self.state()
        if what == "end":
            self._ending = True
            return {"ok": True}
        if what == "own" and self.driver is None:
            self._take(client, str(said.get("folder", "")))
            return {"ok": True}
        if client is not self.driver:
            return {"ok": False, **self.state()}
        if what == "lease":
            self.lease = seconds
        if what == "leave":
            self.warm = bool(said.get("warm"))
            self._let_go(seconds)
        return {"ok": True}

    def state(self) -> dict[str, Any]:
        """State that `ask` returns."""
        left = None if self.driver else max(self._deadline - time.monotonic(), 0.0)
        return {
            "driver": self.driver.pid if self.driver else None,
            "folder": self.folder,
            "ends_in": left,
            "warm": self.warm and self.driver is None,
        }

    def _take(self, client: Client, folder: str) -> None:
        self.driver, self.folder, self.warm = client, folder, False
        # A fork of the driver would hold its connection open beyond its death.
        with contextlib.suppress(OSError):
            self._watch = os.pidfd_open(client.pid)
            self._selector.register(
                self._watch, selectors.EVENT_READ, lambda: self._let_go(self.lease)
            )

    def _let_go(self, seconds: float) -> None:
        self.driver, self._deadline = None, time.monotonic() + seconds
        if self._watch >= 0:
            self._selector.unregister(self._watch)
            os.close(self._watch)
            self._watch = -1

    def _gone(self, client: Client) -> None:
        self._selector.unregister(client.socket)
        client.socket.close()
        if client is self.driver:
            self._let_go(self.lease)


class Connection:
    """A client's side. A client that has said `own` drives the stack until it closes."""

    def __init__(self, directory: Path) -> None:
        """Connect. Raises OSError where no head listens, or it belongs to another user."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(ANSWER_SECONDS)
        try:
            self._socket.connect(str(directory / SOCKET))
        except OSError:
            self._socket.close()
            raise
        self._file = self._socket.makefile("rb")

    def tell(self, do: str, **more: Any) -> None:
        """Send a message without waiting for its answer, which the next `ask` would read."""
        self._socket.sendall(json.dumps({"do": do, **more}).encode() + b"\n")

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        """Send a message and wait for the answer. Raises OSError if the head is gone."""
        self.tell(do, **more)
        return self.heard()

    def heard(self) -> dict[str, Any]:
        """Read the next answer. Raises OSError if none comes."""
        line = self._file.readline()
        if not line:
            raise ConnectionError("the stack's head has closed the connection")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Close the connection; the head then starts the lease."""
        with contextlib.suppress(OSError):
            self._file.close()
            self._socket.close()


def is_open(directory: Path) -> bool:
    """Whether somebody holds a head's control socket open: the head, or who is starting it."""
    try:
        Connection(directory).close()
    except OSError:
        return False
    return True


def state_of(directory: Path) -> dict[str, Any] | None:
    """Ask a head who drives its stack, and when it ends; None if it does not answer."""
    try:
        connection = Connection(directory)
    except OSError:
        return None
    try:
        return connection.ask("ask")
    except (OSError, ValueError):
        return None
    finally:
        connection.close()


def own(directory: Path) -> Connection:
    """Become the driver of a stack.

    Raises:
        StackError: another process drives it, or it is gone.
    """
    try:
        connection = Connection(directory)
        answer = connection.ask("own", folder=working_folder())
    except (OSError, ValueError) as error:
        raise StackError("The stack has ended.", why=str(error)) from None
    if not answer["ok"]:
        connection.close()
        raise StackError(
            f"Process {answer['driver']} drives this stack.", why=f"It works in {answer['folder']}."
        )
    return connection
