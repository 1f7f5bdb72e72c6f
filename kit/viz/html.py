"""HTML that cannot be broken from inside: tags, tables, bars, folded text.

Everything is built with `tag`, whose children are escaped unless they are `Markup`, which only
this module and its like make. No scripts, no links, nothing fetched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from kit.utils.formatting import count, cut, number, one_line, visible
from kit.viz.theme import style_sheet

Child = str | Markup | None
_NO_MATHS = "mathjax_ignore tex2jax_ignore"
"""Keeps notebooks from typesetting what a model wrote: `$5 and $6` is to be read as it is. The two
are what MathJax 3 and later (JupyterLab) and MathJax 2 (nbconvert) look for."""


def tag(name: str, *children: Child, **attributes: str | None) -> Markup:
    """One element. Strings are escaped, `Markup` is kept, None is left out.

    Attribute names end in `_` where Python needs it (`class_`); None leaves an attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(one_line(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{name}{written}>") + join(*children) + Markup(f"</{name}>")


def join(*children: Child) -> Markup:
    """Children one after the other, escaped like those of `tag`."""
    parts = (c if isinstance(c, Markup) else escape(visible(c)) for c in children if c is not None)
    return Markup("").join(parts)


def page(*children: Child) -> str:
    """A whole display: the children inside the kit's style.

    The last pass makes hidden characters visible that somebody forgot to; it leaves tags alone,
    which are plain ASCII.
    """
    return part(style(), *children)


def part(*children: Child) -> str:
    """One of several displays that share a style; see `page`."""
    return visible(str(tag("div", *children, class_=f"kit-viz {_NO_MATHS}")))


def style() -> Markup:
    """The style of every display, for a page of parts."""
    return Markup("<style>") + Markup(style_sheet()) + Markup("</style>")


def spaced(children: Iterable[Child]) -> Markup:
    """Children with a space between them, for rows that a style sheet sets apart.

    A page that does not trust an output takes its style sheet away; words should not run together.
    """
    return Markup(" ").join(join(child) for child in children if child is not None)


def drawing(svg: Markup, words: str) -> Markup:
    """A drawing, and its words for ears and for pages that take drawings away.

    A notebook that is not trusted loses style sheets and drawings, but would keep the letters on
    the axes; `hidden` hides those, and the style sheet, where there is one, turns it around.
    """
    return join(
        tag("div", svg, role="img", aria_label=words, class_="kv-drawing", hidden="hidden"),
        tag("div", f"{words} (trust the notebook to see this drawn)", class_="kv-unstyled"),
    )


def title(words: str, *rest: Child) -> Markup:
    """The line over a display."""
    return tag("div", words, *rest, class_="kv-title")


def note(*children: Child) -> Markup:
    """A quiet line under something."""
    return tag("div", *children, class_="kv-note")


def quiet(words: str) -> Markup:
    """Words in a muted colour."""
    return tag("span", words, class_="kv-muted")


def with_code(words: str) -> Markup:
    """Words in which `names` of code stand between backticks, as docstrings write them."""
    parts = words.split("`")
    if len(parts) % 2 == 0:  # one backtick is no pair
        return join(words)
    return join(*(tag("span", w, class_="kv-text") if i % 2 else w for i, w in enumerate(parts)))


def facts(pairs: Iterable[tuple[str, str]]) -> Markup:
    """A row of headline numbers, each over its name."""
    return tag(
        "div",
        *(tag("div", tag("b", v), " ", tag("span", k), class_="kv-fact") for k, v in pairs),
        class_="kv-facts",
    )


@dataclass(frozen=True, slots=True)
class Column:
    """A column of `table`: its heading, and how its cells sit."""

    name: str
    kind: str = ""
    """`num` right-aligned, `fit` as narrow as its words, `mid` never narrow, `hint` sentences,
    `name` names of settings and metrics, empty the rest. Where there is too little room for all,
    the table scrolls."""


def numeric(*names: str) -> list[Column]:
    """Columns of numbers."""
    return [Column(name, "num") for name in names]


def table(columns: Sequence[Column], rows: Iterable[Sequence[Child]]) -> Markup:
    """A table, which scrolls by itself where the window is too narrow for it.

    The cells of a row are escaped like the children of `tag`.
    """
    classes = [f"kv-{column.kind}" if column.kind else None for column in columns]
    head = (
        tag("th", c.name, scope="col", class_=k or ("kv-words" if c.name else None))
        for c, k in zip(columns, classes, strict=True)
    )
    body = (
        tag("tr", *(tag("td", cell, class_=k) for cell, k in zip(row, classes, strict=True)))
        for row in rows
    )
    drawn = tag("table", tag("thead", tag("tr", *head)), tag("tbody", *body), class_="kv-table")
    return tag("div", drawn, class_="kv-wide")


def fold(summary: Child, *children: Child, is_open: bool = False) -> Markup:
    """Children behind a line to click on."""
    return tag("details", tag("summary", summary), *children, open_="" if is_open else None)


def long_text(text: str, limit: int, preview: int = 240) -> Markup:
    """Text as written: whole where short, else folded, and never more than `limit` bytes.

    What is cut off is counted in words beside it.
    """
    shown, missing = cut(text, limit)
    if not shown:
        return quiet(_missing(missing) if missing else "empty")
    if not missing and len(shown) <= preview and shown.count("\n") < 6:
        return tag("span", shown, class_="kv-text")
    tail = tag("div", _missing(missing), class_="kv-note") if missing else None
    head, _ = cut(text.replace("\n", " "), min(preview // 2, max(limit // 4, 16)))
    size = quiet(f" ({count(len(text), 'character')})")
    summary = join(tag("span", head.rstrip() + " …", class_="kv-text"), size)
    # A browser drops the first newline of <pre>: ours goes, the text's own stays.
    return fold(summary, tag("pre", "\n" + shown, class_="kv-text"), tail)


def _missing(characters: int) -> str:
    return f"… {count(characters, 'more character')} not shown here"


def badge(words: str, kind: str) -> Markup:
    """A framed word; `kind` is good, warn or bad, and the word must say the same."""
    return tag("span", words, class_=f"kv-badge kv-{kind}")


def label(words: str) -> Markup:
    """A small quiet tag."""
    return tag("span", words, class_="kv-tag")


def bar(value: float, scale: float, signed: bool = False) -> Markup:
    """A bar of `value` against `scale`; signed bars grow from the middle to either side."""
    share = min(abs(value) / scale, 1.0) if scale > 0 and math.isfinite(value) else 0.0
    if not signed:
        return tag("span", _fill(0, share, minus=False), class_="kv-bar", aria_hidden="true")
    start = 0.5 - share / 2 if value < 0 else 0.5
    fill = _fill(start, share / 2, minus=value < 0)
    return tag("span", fill, tag("u"), class_="kv-bar", aria_hidden="true")


def _fill(start: float, width: float, minus: bool) -> Markup:
    style = f"left:{100 * start:.4g}%;width:{100 * width:.4g}%"
    return tag("i", style=style, class_="kv-minus" if minus else None)


def number_bar(value: float | None, scale: float, signed: bool = False) -> Markup:
    """A number and its bar."""
    if value is None:
        return quiet("–")
    return join(tag("span", number(value, 3), class_="kv-value"), bar(value, scale, signed))
