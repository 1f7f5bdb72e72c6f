"""`render`: the display of every kind of result.

Each display registers beside its own code; whoever adds a kind of result does so in the same way,
from any package:

    register(UpdateReport, update_html, update_plain)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import singledispatch
from typing import TypeVar

from kit.utils.display import Bundle, bundle
from kit.viz.html import Child, page

Result = TypeVar("Result")


@singledispatch
def render(result: object) -> Bundle:
    """HTML and plain text of a result. Raises TypeError for a kind that has no display."""
    raise TypeError(f"There is no display for {type(result).__name__}.")


def register(
    kind: type[Result], html: Callable[[Result], Child], plain: Callable[[Result], str]
) -> None:
    """Display a kind of result with these two: what goes into a page, and text for a terminal."""
    render.register(kind, lambda result: bundle(page(html(result)), plain(result)))
