"""What `session.sync` does: weights to the engine, and a look whether they arrived."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from kit.reports import SyncReport
from kit.weight_sync.verify import Checksums

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def sync(stack: Stack, version: int, *, exact: bool, verify: bool) -> SyncReport:
    """Hand the weights over. Raises StackError where a checksum says that they did not arrive."""
    begin = time.perf_counter()
    tensors, size = stack.sync(version, exact=exact)
    seconds = time.perf_counter() - begin
    verified = count_verified(stack) if verify else None
    return SyncReport(version, seconds, tensors, size, verified)


def count_verified(stack: Stack) -> int:
    """How many parameters were compared; all of them are equal."""
    sums = Checksums.of(stack.probe("checksums"), stack.checksums(), stack.dtype)
    return sums.require_equal()
