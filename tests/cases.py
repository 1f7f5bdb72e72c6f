"""Which cases run: `make test` runs each kind, `make test-all` every case of it.

A case that takes long and differs from another one in its data only is marked `slow`, and left to
`make test-all`, which sets KIT_TESTS=all. `make test-rest` sets KIT_TESTS=rest: it runs what
`make test` leaves out, and of that what fits into KIT_TESTS_MINUTES.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import pytest

Case = TypeVar("Case")

WHICH = os.environ.get("KIT_TESTS", "")
EVERY = WHICH in ("all", "rest")
MINUTES = float(os.environ.get("KIT_TESTS_MINUTES") or "inf")


def some(few: Case, every: Case) -> Case:
    """What a test goes through, and what it goes through where every case is wanted.

    Such a test is marked `wider`, so that `make test-rest` runs it again.
    """
    return every if EVERY else few


def slow(*cases: Any) -> list[Any]:
    """Cases of a parametrised test for `make test-all` only."""
    return [
        pytest.param(*case, marks=pytest.mark.slow)
        if isinstance(case, tuple)
        else pytest.param(case, marks=pytest.mark.slow)
        for case in cases
    ]


def wanted(item: pytest.Item) -> bool:
    """Is this test one of those that were asked for?"""
    is_slow = item.get_closest_marker("slow") is not None
    if WHICH == "rest":
        return is_slow or item.get_closest_marker("wider") is not None
    return EVERY or not is_slow
