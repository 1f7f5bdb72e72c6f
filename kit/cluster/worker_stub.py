"""Ray's worker command: asks the fork server for a worker, and lives as long as it does.

Kept to the standard library, so that it starts in a few hundredths of a second. Where a worker
needs what a fork cannot give (a runtime environment of its own), Ray's own script runs instead.
"""

import json
import os
import socket
import sys

ORDINARY_CONTEXT = {"command_prefix", "env_vars", "py_executable", "override_worker_entrypoint"}


def ordinary(argv: list[str]) -> bool:
    """Whether this worker needs only Ray's default environment."""
    for word in argv:
        if word.startswith("--serialized-runtime-env-context="):
            context = json.loads(word.partition("=")[2] or "{}")
            default = context.get("py_executable") in (None, sys.executable)
            return default and not any(
                context.get(key) for key in ORDINARY_CONTEXT - {"py_executable"}
            )
    return True


def main() -> None:
    """Ask for the fork and wait until it has ended."""
    own = ("--serialized-runtime-env-context", "--language")
    argv = [word for word in sys.argv[1:] if not word.startswith(own)]
    if not ordinary(sys.argv[1:]):
        setup = os.environ["KIT_RAY_SETUP_WORKER"]
        os.execv(sys.executable, [sys.executable, setup, *sys.argv[1:]])
    request = {"kind": "script", "argv": argv, "env": dict(os.environ), "cwd": os.getcwd()}
    payload = json.dumps(request).encode()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.connect(os.environ["KIT_ZYGOTE_SOCKET"])
    socket.send_fds(connection, [len(payload).to_bytes(4, "big")], [0, 1, 2])
    connection.sendall(payload)
    connection.recv(1)  # returns when the fork has ended


if __name__ == "__main__":
    main()
