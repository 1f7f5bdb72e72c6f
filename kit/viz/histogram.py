"""Two distributions over the same values, as bars side by side: one filled, one hollow."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.utils.formatting import number
from kit.viz.html import drawing, tag

BINS = 12
"""Bars of one distribution, where it has more different values than this."""


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 760.0, 190.0, 6.0, 18.0, 24.0


Bin = tuple[str, int, int]
"""What a bar stands for, and how often it came in each distribution."""


def bins(first: Sequence[float], second: Sequence[float]) -> list[Bin]:
    """Count both over the same values, or the same ranges where the values are many."""
    values = sorted({*first, *second})
    if len(values) <= BINS:
        return [(number(v), list(first).count(v), list(second).count(v)) for v in values]
    low, high = values[0], values[-1]
    width = high / BINS - low / BINS
    counts = [[0] * BINS, [0] * BINS]
    for row, series in zip(counts, (first, second), strict=True):
        for value in series:
            # Divided first: the largest floats have no difference.
            row[min(int(value / width - low / width), BINS - 1)] += 1
    names = [number(low + width * (place + 0.5), 3) for place in range(BINS)]
    return list(zip(names, *counts, strict=True))


def histogram(counted: Sequence[Bin], names: tuple[str, str]) -> Markup:
    """The bars, their counts over them and their values under them."""
    most = max((max(one, two) for _, one, two in counted), default=0)
    slot = (_WIDTH - 2 * _LEFT) / max(len(counted), 1)
    bar_width = min(slot * 0.36, 46.0)
    parts: list[Markup] = []
    for place, (words, *amounts) in enumerate(counted):
        middle = _LEFT + slot * (place + 0.5)
        for series, amount in enumerate(amounts):
            left = middle + (1.5 if series else -1.5 - bar_width)
            parts += _bar(left, bar_width, amount, most, hollow=bool(series))
        parts.append(_word(middle, _HEIGHT - 8, words, "var(--kv-fg)"))
    base = _HEIGHT - _BOTTOM
    parts.append(tag("path", d=f"M{_LEFT} {base}H{_WIDTH - _LEFT}", style="stroke:var(--kv-muted)"))
    told = "; ".join(f"{words}: {one} and {two}" for words, one, two in counted)
    svg = tag("svg", *parts, viewBox=f"0 0 {_WIDTH:g} {_HEIGHT:g}", style=f"width:{_WIDTH:g}px")
    legend = tag(
        "div",
        tag("span", _key(hollow=False), names[0]),
        " ",
        tag("span", _key(hollow=True), names[1]),
        class_="kv-legend",
    )
    words = f"How often each reward was given, {names[0]} and {names[1]}. {told}"
    return tag("div", legend, drawing(svg, words))


def _bar(left: float, width: float, amount: int, most: int, hollow: bool) -> list[Markup]:
    if not amount:
        return []
    room = _HEIGHT - _TOP - _BOTTOM
    height = max(room * amount / most, 2.0) if math.isfinite(most) else 0.0
    top = _HEIGHT - _BOTTOM - height
    box = tag(
        "rect", x=f"{left:.1f}", y=f"{top:.1f}", width=f"{width:.1f}", height=f"{height:.1f}",
        style=_ink(hollow),
    )  # fmt: skip
    return [box, _word(left + width / 2, top - 4, f"{amount:,}", "var(--kv-muted)")]


def _word(x: float, y: float, words: str, ink: str) -> Markup:
    return tag(
        "text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor="middle",
        style=f"fill:{ink};font-size:11.5px",
    )  # fmt: skip


def _ink(hollow: bool) -> str:
    if hollow:
        return "fill:none;stroke:var(--kv-point);stroke-width:2;stroke-dasharray:4 2"
    return "fill:var(--kv-curve);stroke:var(--kv-curve);stroke-width:2"


def _key(hollow: bool) -> Markup:
    box = tag("rect", x="2", y="2", width="14", height="9", style=_ink(hollow))
    return tag(
        "svg", box, viewBox="0 0 18 13", aria_hidden="true",
        style="width:18px;display:inline-block;vertical-align:baseline;margin-right:5px",
    )  # fmt: skip
