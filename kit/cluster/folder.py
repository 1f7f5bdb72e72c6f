"""Where the folders of stacks are made: Ray's sockets want a short path in plain letters."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from kit.errors import StackError

LONGEST_SOCKET = 107
"""Bytes of a socket's path that Linux takes."""
SOCKET = "/kit-xxxxxxxx/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path below the temporary folder that a stack needs."""
OTHERS = ("/tmp", "/var/tmp", "/dev/shm")
"""Where stacks go if the temporary folder (TMPDIR) will not do, as in jobs of Slurm."""


def stacks_root() -> Path:
    """Folder in which stacks make theirs: the temporary one if it will do, else another.

    Raises:
        StackError: there is none.
    """
    wanted = tempfile.gettempdir()
    for place in (wanted, *OTHERS):
        if not unsuitable(place) and os.access(place, os.W_OK | os.X_OK):
            return Path(place)
    raise StackError(
        f"Ray cannot keep its sockets below {wanted}: {unsuitable(wanted)}; and none of "
        f"{', '.join(OTHERS)} can be written to.",
        fix=f"set TMPDIR to a folder whose path has {LONGEST_SOCKET - len(SOCKET)} characters or "
        "less.",
    )


def unsuitable(place: str) -> str:
    """Why Ray cannot keep its sockets below a folder; empty where it can."""
    if not place.isascii():
        return "its path has letters that Ray cannot read"
    if len(place) + len(SOCKET) > LONGEST_SOCKET:
        return (
            f"its path has {len(place)} characters, and Ray's sockets below it would get names "
            "longer than Linux takes"
        )
    return ""
