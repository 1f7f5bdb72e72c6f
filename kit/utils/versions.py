"""Versions of Python and of installed packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata

STACK = ("kit", "sglang", "torch", "transformers", "ray")
"""The packages that decide what a run computes."""


def installed_version(package: str) -> str | None:
    """A package's version; None for one that is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions(packages: Sequence[str] = STACK) -> dict[str, str | None]:
    """The versions of Python and of these packages; None for one that is not installed."""
    return {"python": platform.python_version()} | {p: installed_version(p) for p in packages}
