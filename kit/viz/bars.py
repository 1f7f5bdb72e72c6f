"""A row of bars as SVG: one number each, drawn up or down from zero, in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kit.utils.formatting import number
from kit.viz.html import Child, drawing, tag

WIDTH, HEIGHT = 360, 96
"""In CSS pixels."""


MARGIN = 16
"""Over the bars and under them, for a line of words each."""


MOST_SPOKEN = 8


LABELLED = 10
"""Up to so many bars, each has its name under it; above, the first and the last."""


def bars(points: Sequence[tuple[str, float]], heading: str) -> Markup:
    """The heading, and one bar for each (name, value); the largest value is written over them.

    A value that is not a number leaves a pale bar over the whole height. Screen readers get the
    heading and the first values.
    """
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    known = [value for value in values if not math.isnan(value)]
    high, low = max([0.0, *known]), min([0.0, *known])
    room = HEIGHT - 2 * MARGIN
    unit = room / (high - low) if high > low else 0.0
    zero = MARGIN + high * unit if unit else MARGIN + room
    step = WIDTH / max(len(points), 1)
    drawn = [_bar(place * step, step, value, zero, unit) for place, value in enumerate(values)]
    spoken = "; ".join(f"{name}: {number(value)}" for name, value in points[:MOST_SPOKEN])
    svg = tag(
        "svg",
        _label(_between(known), 0, 11, "start"),
        *drawn,
        *_names([name for name, _ in points], step),
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        width=str(WIDTH),
        height=str(HEIGHT),
    )
    words = f"{heading}: {spoken}"
    return tag("div", tag("div", heading, class_="kv-muted"), drawing(svg, words))


def _between(known: Sequence[float]) -> str:
    """The largest value, and the smallest where there are values below zero."""
    highest = number(max(known, default=0.0))
    return f"{highest} to {number(min(known))}" if known and min(known) < 0 else highest


def side_by_side(pictures: Sequence[Markup]) -> Markup | None:
    """Two to a row; None where there are none."""
    return tag("div", *pictures, class_="kv-two") if pictures else None


def _bar(left: float, step: float, value: float, zero: float, unit: float) -> Markup:
    missing = math.isnan(value)
    size = HEIGHT - 2 * MARGIN if missing else max(abs(value) * unit, 0.5)
    top = MARGIN if missing else zero - size if value >= 0 else zero
    colour = "track" if missing else "curve" if value >= 0 else "down"
    return tag(
        "rect",
        x=f"{left + 0.1 * step:.1f}",
        y=f"{top:.1f}",
        width=f"{0.8 * step:.1f}",
        height=f"{size:.1f}",
        style=f"fill:var(--kv-{colour})",
    )


def _names(names: Sequence[str], step: float) -> list[Child]:
    floor = HEIGHT - 3
    if 1 < len(names) <= LABELLED and max(map(len, names)) * 6 < step:
        return [_label(name, (i + 0.5) * step, floor, "middle") for i, name in enumerate(names)]
    ends: list[Child] = [_label(names[0], 0, floor, "start")] if names else []
    return [*ends, _label(names[-1], WIDTH, floor, "end")] if len(names) > 1 else ends


def _label(words: str, x: float, y: float, anchor: str) -> Markup:
    style = f"fill:var(--kv-muted);font-size:10.5px;text-anchor:{anchor}"
    return tag("text", words, x=f"{x:g}", y=f"{y:g}", style=style)
