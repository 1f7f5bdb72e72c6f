"""Faster imports in the notebook's process."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

GRAMMAR = "rfc3987_syntax"


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Import without garbage collection, which would take a fifth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def import_ray() -> None:
    """Import Ray without the address grammar that its jsonschema would build.

    That takes a second, and only `iri` formats need it. They get it when one is first checked.
    """
    if "ray" in sys.modules:
        return
    late = GRAMMAR not in sys.modules and "jsonschema" not in sys.modules
    if late:
        sys.modules[GRAMMAR] = _made_when_needed()
    try:
        with without_garbage_collection():
            importlib.import_module("ray")
    finally:
        if late:
            del sys.modules[GRAMMAR]


def _made_when_needed() -> ModuleType:
    def is_valid_syntax(*args: Any) -> Any:
        return importlib.import_module(GRAMMAR).is_valid_syntax(*args)

    module = ModuleType(GRAMMAR)
    module.is_valid_syntax = is_valid_syntax  # type: ignore[attr-defined]
    return module
