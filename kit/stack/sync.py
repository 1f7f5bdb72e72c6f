"""What `session.sync` does: weights to the engine, and a look whether they arrived."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kit.diagnostics.mismatch.probes import Checksums
from kit.errors import StackError
from kit.reports import SyncReport

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def sync(stack: Stack, version: int, *, exact: bool, verify: bool) -> SyncReport:
    """Hand the weights over. Raises StackError where a checksum says that they did not arrive."""
    begin = time.perf_counter()
    tensors, size = stack.sync(version, exact=exact)
    seconds = time.perf_counter() - begin
    verified = _verified(stack) if verify else None
    return SyncReport(version, seconds, tensors, size, verified)


def _verified(stack: Stack) -> int:
    """How many parameters were compared; all of them are equal."""
    found = Checksums.of(stack.probe("checksums"), stack.checksums(), stack.dtype)
    if found.different:
        raise StackError(
            f"{len(found.different)} of {found.compared} parameters did not reach the engine: "
            f"{', '.join(found.different[:3])}{' ...' if len(found.different) > 3 else ''}.",
            why="After the hand-over their checksums differ between trainer and engine.",
            fix="call session.sync(verify=True) again; if they differ still, "
            "session.check_mismatch(deep=True) looks for the cause.",
        )
    return found.compared
