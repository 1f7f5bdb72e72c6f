"""Ask a result for its display, as a notebook would."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Show = Callable[[object], str]


@pytest.fixture
def html() -> Show:
    """The HTML that a result shows itself with, checked to be fit for a notebook file."""

    def ask(result: object) -> str:
        shown: str = result._repr_mimebundle_()["text/html"]  # type: ignore[attr-defined]
        shown.encode("utf-8")
        return shown

    return ask


@pytest.fixture
def plain() -> Show:
    """The plain text that a result shows itself with."""

    def ask(result: object) -> str:
        shown: str = result._repr_mimebundle_()["text/plain"]  # type: ignore[attr-defined]
        shown.encode("utf-8")
        return shown

    return ask
