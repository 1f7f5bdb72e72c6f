"""`plain`: values of NumPy, torch, pandas and Arrow as Python's own, all the way down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def plain(value: Any) -> Any:
    """Copy of a value in which arrays are lists, scalars numbers, and mappings dicts."""
    if value is None or (
        isinstance(value, (str, bool, int, float)) and not hasattr(value, "dtype")
    ):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    for convert in ("tolist", "as_py"):  # arrays and tensors; Arrow's values
        if hasattr(value, convert):
            return plain(getattr(value, convert)())
    return value


def without_gaps(row: Mapping[str, Any]) -> dict[str, Any]:
    """Row of a table without the fields that are empty, which tables fill with NaN or NA."""
    return {str(key): value for key, value in row.items() if not _is_gap(value)}


def _is_gap(value: Any) -> bool:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    return type(value).__name__ in ("NAType", "NaTType")  # pandas' own, without importing it
