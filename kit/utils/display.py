"""Displays of results in notebooks and terminals, and the one door from results to pictures.

Results stand below `kit.viz` and know nothing of it. They ask here for their picture, and `kit.viz`
has a function for each kind of result (`kit.viz.render`), which is loaded when the first is asked
for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kit.utils.formatting import visible

Bundle = dict[str, str]
"""What a notebook stores of a result, by MIME type."""


@dataclass(frozen=True, slots=True)
class Picture:
    """Something to look at: HTML for notebooks, words for terminals, PNG where it is a plot."""

    html: str
    plain: str
    png: str = ""
    """Base64, as notebooks store it; empty for what is not a plot."""

    def __str__(self) -> str:
        return visible(self.plain)

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        image = {"image/png": self.png} if self.png else {}
        return bundle(self.html, self.plain) | image


def bundle(html: str, plain: str) -> Bundle:
    """Make a MIME bundle; hidden characters are made visible in its plain text."""
    return {"text/html": html, "text/plain": visible(plain)}


def pictures() -> Any:
    """The module `kit.viz`: the only way from a result to a picture of it."""
    from kit import viz

    return viz


class Displayed:
    """A result that a notebook shows as `kit.viz.render` draws it."""

    __slots__ = ()

    def _repr_mimebundle_(self, **_: Any) -> Bundle:
        drawn: Bundle = pictures().render(self)
        return drawn


class Shown(Displayed):
    """A result that a terminal shows so too: its `str` is the plain text of its display."""

    __slots__ = ()

    def __str__(self) -> str:
        return self._repr_mimebundle_()["text/plain"]
