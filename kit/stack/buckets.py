"""How weights are divided on their way to the engine; nothing here needs torch."""

from __future__ import annotations

from collections.abc import Iterable

SLOTS = 2
"""Buffers of a GPU's trainer: one is filled while the engine reads the other."""


def in_buckets(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names, in order, in buckets of at most `limit` bytes; what is larger is alone.

    Args:
        sizes: (name, bytes).
        limit: bytes.
    """
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if size > room or not buckets:
            buckets.append([])
            room = limit
        buckets[-1].append(name)
        room -= size
    return buckets
