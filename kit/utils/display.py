"""What a notebook and a terminal show of a result; the one door to `kit.viz`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kit.utils.formatting import visible


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


Bundle = dict[str, str]


def bundle(html: str, plain: str) -> Bundle:
    """What a notebook stores of a result. A terminal is as open to hidden characters as a page."""
    return {"text/html": html, "text/plain": visible(plain)}


class Shown:
    """A result that `kit.viz.show_report` knows how to draw."""

    __slots__ = ()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_report

        return show_report(self)

    def __str__(self) -> str:
        return self._repr_mimebundle_()["text/plain"]
