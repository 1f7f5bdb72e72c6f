"""Checks of a verb's arguments."""

from __future__ import annotations

from typing import Any, TypeVar

from kit.errors import SessionError

T = TypeVar("T")


def expect(value: Any, kind: type[T], verb: str, fix: str) -> T:
    """Check that a value is of this kind. Raises SessionError otherwise."""
    if isinstance(value, kind):
        return value
    raise SessionError(
        f"{verb} needs a {kind.__name__}, got {type(value).__name__} ({str(value)[:60]!r}).",
        fix=fix,
    )


def at_least_one(value: Any, name: str) -> int:
    """Check for a whole number of 1 or more. Raises SessionError otherwise."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise SessionError(f"{name} is {value!r}.", fix=f"give {name} a whole number of 1 or more.")


def share(value: Any, name: str) -> float:
    """Check for a number above 0, up to 1. Raises SessionError otherwise."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1:
        return float(value)
    raise SessionError(f"{name} is {value!r}.", fix=f"give {name} a number above 0, up to 1.")


def temperature(value: Any) -> float:
    """Check for a number of 0 or more. Raises SessionError otherwise."""
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e6:
        return float(value)
    raise SessionError(
        f"temperature is {value!r}.", fix="give a number of 0 (greedy) or more; 1 is usual."
    )
