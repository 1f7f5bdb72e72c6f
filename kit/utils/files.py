"""Files and directories that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from kit.errors import StackError
from kit.utils.interrupts import held

AT_FDCWD, RENAME_EXCHANGE = -100, 2
"""Arguments of Linux's renameat2: relative to the working directory; swap the two names."""


def runs_here() -> Path:
    """`papermill_runs` in the working folder, or in the home of who may not write there."""
    here = Path("papermill_runs")
    written = here if os.path.exists(here) else Path()  # false too where nothing may be seen
    own = Path(os.path.expanduser("~"))
    return here if os.access(written, os.W_OK) else own / here


def working_folder() -> str:
    """The working directory. Raises StackError where it was deleted."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        raise StackError(
            "The working directory of this process was deleted.",
            why="Files would be written below it, and processes started in it.",
            fix="change to a folder that is there, such as os.chdir(os.path.expanduser('~')); in a "
            "terminal, `cd` into it again.",
        ) from None


@contextmanager
def in_living_folder() -> Iterator[None]:
    """Explain a FileNotFoundError that comes of a working directory which was deleted.

    Raises:
        StackError: instead of it.
    """
    try:
        yield
    except FileNotFoundError:
        working_folder()
        raise


@contextmanager
def replacing_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the name `target` when the block ends without error."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def replace_file(target: Path, text: str) -> Path:
    """Write a file so that no reader ever sees half of it; returns its path."""
    with replacing_file(target) as partial:
        partial.write_text(text, encoding="utf-8")
    return target


@contextmanager
def replacing_directory(target: Path) -> Iterator[Path]:
    """Yield an empty directory, which takes the name `target` when the block ends without error.

    What was at `target` is there until then and is removed afterwards. What processes that were
    killed while they wrote to the same target have left is removed first.
    """
    for left in target.parent.glob(f"{target.name}.partial-*"):
        pid = left.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        yield partial
        with held():
            _put_in_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put_in_place(made: Path, target: Path) -> None:
    """Give `made` the name `target`.

    At no moment is there nothing, or half of something, at `target`; only where a file system
    cannot swap two names, it is missing for the time between two renames.
    """
    if not target.exists():
        made.rename(target)
    elif _swap(made, target):
        shutil.rmtree(made, ignore_errors=True)
    else:
        old = target.with_name(f"{target.name}.old-{os.getpid()}")
        target.rename(old)
        made.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    sync_directory(target.parent)


def _swap(one: Path, other: Path) -> bool:
    """Swap two names; False where the file system or the C library cannot."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(rename(AT_FDCWD, paths[0], AT_FDCWD, paths[1], RENAME_EXCHANGE) == 0)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
