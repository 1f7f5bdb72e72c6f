"""Which tests run: `make test` runs each kind, `make test-all` every case of it.

A case that takes long and differs from another one in its data only is marked `slow`, and left to
`make test-all`, which sets KIT_TESTS=all.
"""

from __future__ import annotations

import os
from typing import TypeVar

Case = TypeVar("Case")

EVERY = os.environ.get("KIT_TESTS") == "all"


def some(few: Case, every: Case) -> Case:
    """What a test goes through, and what it goes through where every case is wanted."""
    return every if EVERY else few
