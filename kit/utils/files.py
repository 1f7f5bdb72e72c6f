"""A finished directory to its place in one move, also where another one is."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Of Linux: from the directory of the process; swap the two names."""


def put_in_place(made: Path, target: Path) -> None:
    """Have `target` name what `made` names; what was there before is removed afterwards.

    At no moment is there nothing, or half of something, at `target`; only where a file system
    cannot swap two names, it is missing for the time between two renames.
    """
    if not target.exists():
        made.rename(target)
    elif _swapped(made, target):
        shutil.rmtree(made, ignore_errors=True)
    else:
        old = target.with_name(f"{target.name}.old-{os.getpid()}")
        target.rename(old)
        made.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    confirm(target.parent)


def _swapped(one: Path, other: Path) -> bool:
    """Swap two names; False where the file system or the C library cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def confirm(directory: Path) -> None:
    """Have the disk confirm the names in a directory."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_whole(target: Path, text: str) -> Path:
    """Write a file so that nobody ever sees half of it."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target
