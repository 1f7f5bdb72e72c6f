"""Charts as SVG in the page's colours: bars, histograms, panels of curves, bands over runs.

Each takes a millisecond, so that they can be drawn again and again while training runs. Curves that
stay are matplotlib's (`kit.viz.plots`): a figure of six panels takes it a third of a second, which
is longer than a step of the embedded model.

An `Axes` turns values into places; `text`, `stroke`, `box` and `dots` draw there. An ink is a
colour of `kit.viz.theme` by its name.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING

from markupsafe import Markup

from kit.tracking.catalog import meaning, short_name
from kit.utils.formatting import count, number, shorten
from kit.viz.curves import SMOOTHED_FROM, Curve, Points, in_words, smooth
from kit.viz.html import Child, drawing, note, spaced, tag

if TYPE_CHECKING:
    from kit.reports.runs import Band


LEAST = 0.75
"""Share of its width down to which a drawing shrinks: its letters are to be read."""


class Axes:
    """Maps values to places in a drawing of so many CSS pixels.

    Args:
        width: of the drawing.
        height: of the drawing.
        margins: left, right, top and bottom.
        across: the values at the left and at the right end.
        up: the values at the bottom and at the top; they differ.
    """

    def __init__(
        self,
        width: float,
        height: float,
        margins: tuple[float, float, float, float],
        across: tuple[float, float],
        up: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self.width, self.height, self.up = width, height, up
        self.left, self.right = margins[0], width - margins[1]
        self.top, self.floor = margins[2], height - margins[3]
        self._first, self._steps = across[0], across[1] - across[0]
        # Halved, because the span of two finite numbers may not be one.
        self._low, self._span = up[0] / 2, up[1] / 2 - up[0] / 2

    def x(self, value: float) -> float:
        """The place of a value between left and right; the middle where there is but one value."""
        share = (value - self._first) / self._steps if self._steps > 0 else 0.5
        return self.left + (self.right - self.left) * share

    def y(self, value: float) -> float:
        """The place of a value between floor and top."""
        share = (value / 2 - self._low) / self._span
        return self.floor - (self.floor - self.top) * min(max(share, 0.0), 1.0)

    def places(self, points: Iterable[tuple[float, float]]) -> Points:
        """The places of (x, y) values."""
        return [(self.x(x), self.y(y)) for x, y in points]

    def rules(self, values: Iterable[float]) -> Markup:
        """A quiet line across at each of these values."""
        lines = (f"M{self.left:g} {self.y(value):.1f}H{self.right:g}" for value in values)
        return stroke("".join(lines), "track")

    def labels(self, values: Iterable[float]) -> Iterator[Markup]:
        """The values themselves, left of the drawing area."""
        for value in values:
            yield text(self.left - 6, self.y(value) + 4, number(value, 3), "end")

    def svg(self, *parts: Child) -> Markup:
        """The drawing. Where there is less room than `LEAST` of its width, it scrolls."""
        size = {"width": f"{self.width:g}", "height": f"{self.height:g}"}
        size["style"] = f"min-width:{LEAST * self.width:g}px"
        return tag("svg", *parts, viewBox=f"0 0 {self.width:g} {self.height:g}", **size)


def text(
    x: float,
    y: float,
    words: str,
    anchor: str | None = None,
    ink: str = "muted",
    size: float = 11.5,
    weight: str | None = None,
) -> Markup:
    """Words that begin, end or have their middle (`anchor`) at a place."""
    return tag(
        "text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, fill=f"var(--kv-{ink})",
        font_size=f"{size:g}", font_weight=weight,
    )  # fmt: skip


def stroke(
    path: str,
    ink: str,
    width: float | None = None,
    dashes: str | None = None,
    opacity: str | None = None,
) -> Markup:
    """A line along a path."""
    return tag(
        "path", d=path, fill="none", stroke=f"var(--kv-{ink})",
        stroke_width=f"{width:g}" if width else None, stroke_dasharray=dashes, opacity=opacity,
    )  # fmt: skip


def box(x: float, y: float, width: float, height: float, ink: str, **look: str | None) -> Markup:
    """A rectangle filled with an ink; `look` adds to its attributes or takes their place."""
    look = {"fill": f"var(--kv-{ink})", **look}
    return tag(
        "rect", x=f"{x:.1f}", y=f"{y:.1f}", width=f"{width:.1f}", height=f"{height:.1f}", **look
    )


def dots(places: Iterable[tuple[float, float]], radius: float, ink: str) -> Markup:
    """A dot at each place."""
    turn = f"a{radius:g} {radius:g} 0 1 0"
    path = "".join(
        f"M{x - radius:.1f} {y:.1f}{turn} {2 * radius:g} 0{turn} -{2 * radius:g} 0"
        for x, y in places
    )
    return tag("path", d=path, fill=f"var(--kv-{ink})")


def polyline(places: Iterable[tuple[float, float]]) -> str:
    """The path through these places."""
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from below `low` to above `high`, about so many."""
    if high <= low:
        return [low]
    size = (high - low) / about
    power = 10.0 ** math.floor(math.log10(size))
    unit = next(power * factor for factor in (1, 2, 2.5, 5, 10) if size <= power * factor * 1.001)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    return [unit * place for place in range(first, last + 1)]


def side_by_side(pictures: Sequence[Markup]) -> Markup | None:
    """Two to a row; None where there are none."""
    return tag("div", *pictures, class_="kv-two") if pictures else None


# ---- bars: one number each -----------------------------------------------------------------------

MOST_SPOKEN = 8
"""Bars that are read out to those who do not see them."""
LABELLED = 10
"""Up to so many bars, each has its name under it; above, the first and the last."""


def bars(points: Sequence[tuple[str, float]], heading: str) -> Markup:
    """The heading, and one bar for each (name, value), drawn up or down from zero.

    The largest value is written over them. A value that is not a number leaves a pale bar over the
    whole height. Screen readers get the heading and the first values.
    """
    values = [value if math.isfinite(value) else math.nan for _, value in points]
    known = [value for value in values if not math.isnan(value)]
    low, high = min([0.0, *known]), max([0.0, *known])
    up = (low, high) if high > low else (0.0, 1.0)
    axes = Axes(360, 96, (0, 0, 16, 16), (0, max(len(points), 1)), up)
    highest = number(max(known, default=0.0))
    svg = axes.svg(
        text(0, 11, f"{highest} to {number(low)}" if low < 0 else highest, size=10.5),
        *(_bar(axes, place, value) for place, value in enumerate(values)),
        *_bar_names(axes, [name for name, _ in points]),
    )
    spoken = "; ".join(f"{name}: {number(value)}" for name, value in points[:MOST_SPOKEN])
    words = f"{heading}: {spoken}"
    return tag("div", tag("div", heading, class_="kv-muted"), drawing(svg, words))


def _bar(axes: Axes, place: int, value: float) -> Markup:
    left, width = axes.x(place + 0.1), axes.x(0.8)
    if math.isnan(value):
        return box(left, axes.top, width, axes.floor - axes.top, "track")
    zero = axes.y(0.0)
    size = max(abs(axes.y(value) - zero), 0.5)
    if value < 0:
        return box(left, zero, width, size, "down")
    return box(left, zero - size, width, size, "curve")


def _bar_names(axes: Axes, names: Sequence[str]) -> list[Markup]:
    y = axes.height - 3
    if 1 < len(names) <= LABELLED and max(map(len, names)) * 6 < axes.x(1):
        named = enumerate(names)
        return [text(axes.x(i + 0.5), y, name, "middle", size=10.5) for i, name in named]
    ends = [(0, "start"), (axes.width, "end")]
    shown = [names[0], names[-1]] if len(names) > 1 else names
    return [text(x, y, n, anchor, size=10.5) for n, (x, anchor) in zip(shown, ends, strict=False)]


# ---- histogram: two distributions over the same values -------------------------------------------

BINS = 12
"""Bars of one distribution, where it has more different values than this."""
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
    """Both distributions side by side, one filled, one hollow, with their counts and values."""
    most = max((max(one, two) for _, one, two in counted), default=0)
    axes = Axes(760, 190, (6, 6, 18, 24), (0, max(len(counted), 1)), (0, max(most, 1)))
    width = min((axes.x(1) - axes.x(0)) * 0.36, 46.0)
    parts: list[Markup] = []
    for place, (words, *amounts) in enumerate(counted):
        middle = axes.x(place + 0.5)
        for series, amount in enumerate(amounts):
            left = middle + (1.5 if series else -1.5 - width)
            if amount:
                height = max(axes.floor - axes.y(amount), 2.0)
                top = axes.floor - height
                parts.append(_histogram_box(left, top, width, height, hollow=bool(series)))
                parts.append(text(left + width / 2, top - 4, f"{amount:,}", "middle"))
        parts.append(text(middle, axes.height - 8, words, "middle", "fg"))
    parts.append(stroke(f"M{axes.left:g} {axes.floor:g}H{axes.right:g}", "muted"))
    keys = (tag("span", _key(i), name) for i, name in enumerate(names))
    spoken = "; ".join(f"{words}: {one} and {two}" for words, one, two in counted)
    words = f"How often each reward was given, {names[0]} and {names[1]}. {spoken}"
    legend = tag("div", spaced(keys), class_="kv-legend")
    return tag("div", legend, drawing(axes.svg(*parts), words))


def _histogram_box(x: float, y: float, width: float, height: float, hollow: bool) -> Markup:
    ink = "point" if hollow else "curve"
    look: dict[str, str | None] = {"stroke": f"var(--kv-{ink})", "stroke_width": "2"}
    if hollow:
        look |= {"fill": "none", "stroke_dasharray": "4 2"}
    return box(x, y, width, height, ink, **look)


def _key(series: int) -> Markup:
    return tag(
        "svg", _histogram_box(2, 2, 14, 9, hollow=bool(series)), viewBox="0 0 18 13",
        aria_hidden="true",
        style="width:18px;display:inline-block;vertical-align:baseline;margin-right:5px",
    )  # fmt: skip


# ---- panels: a small curve each ------------------------------------------------------------------

SET_MARKS = (
    ("◆", "point", "M{x:.1f} {top:.1f}l4 4l-4 4l-4 -4z"),
    ("■", "s3", "M{x:.1f} {top:.1f}m-3.4 .6h6.8v6.8h-6.8z"),
    ("▲", "s4", "M{x:.1f} {top:.1f}l4.2 7.4h-8.4z"),
    ("▼", "s5", "M{x:.1f} {top:.1f}m-4.2 .6h8.4l-4.2 7.4z"),
)
"""Of each held-out set: the mark as a sign, its colour, and its outline below a point."""
MOST_POINTS = 150
"""A panel is no wider than so many points can be told apart."""


def panels(drawn: Sequence[Curve]) -> Markup:
    """Draw one panel per curve, as many in a row as fit the page."""
    return tag("div", *map(_panel, drawn), class_="kv-panels")


def caption(drawn: Sequence[Curve]) -> Markup | None:
    """Caption that explains a mean over a faint line."""
    many = any(len(curve.points) >= SMOOTHED_FROM for curve in drawn)
    return note("Thin: each step. Thick: running mean over a twentieth of them.") if many else None


def _panel(curve: Curve) -> Markup:
    last = curve.points[-1][1] if curve.points else None
    evaluations = [
        note(f"{sign} {shorten(name, 40)} {number(points[-1][1], 3)}")
        for (sign, *_), (name, points) in zip(
            cycle(SET_MARKS), curve.evaluations.items(), strict=False
        )
    ]
    dropped = f"! {count(curve.dropped, 'step')} without a finite value"
    return tag(
        "div",
        tag(
            "div",
            tag("span", shorten(short_name(curve.name), 40), title=meaning(curve.name).words),
            tag("b", number(last, 3)),
            class_="kv-panel-head",
        ),
        _curve(curve),
        *evaluations,
        note(dropped) if curve.dropped else None,
        class_="kv-panel",
    )


def _curve(curve: Curve) -> Markup:
    """The highest and the lowest value, the first and the last step, and the curve between."""
    shown = [*curve.points, *(p for points in curve.evaluations.values() for p in points)]
    if not shown:
        words = "no finite value" if curve.dropped else "nothing yet"
        return tag("div", words, class_="kv-panel-empty")
    steps, values = [step for step, _ in shown], [value for _, value in shown]
    low, high = min(values), max(values)
    flat = high - low <= 1e-12 * max(abs(low), abs(high), 1e-300)
    room = (abs(low) / 2 or 0.5) if flat else 0.0
    across = (min(steps), max(steps))
    axes = Axes(300, 100, (60, 6, 8, 19), across, (low - room, high + room))
    y = axes.height - 4
    parts = [axes.rules(axes.up), *axes.labels([low] if flat else [low, high])]
    parts.append(text(axes.right, y, f"step {across[1]:g}", "end"))
    if across[1] > across[0]:
        parts.append(text(axes.left, y, f"step {across[0]:g}"))
    parts += _line(axes, curve.points)
    sets = zip(cycle(SET_MARKS), curve.evaluations.values(), strict=False)
    parts += [_marks(axes, points, ink, outline) for (_, ink, outline), points in sets]
    return drawing(axes.svg(*parts), in_words(curve))


def _line(axes: Axes, points: Points) -> list[Markup]:
    """The curve: dots where they are few, a running mean over a faint line where they are many."""
    if not points:
        return []
    if len(points) < SMOOTHED_FROM:
        places = axes.places(points)
        return [stroke(polyline(places), "curve", 1.6), dots(places, 2.2, "curve")]
    window, every = max(3, len(points) // 20), -(-len(points) // MOST_POINTS)
    thin = polyline(axes.places(_thinned(points)))
    thick = polyline(axes.places(smooth(points, window, every)))
    lines = [stroke(thin, "curve", 0.8, opacity="0.55"), stroke(thick, "curve", 2.0)]
    return [*lines, dots(axes.places(points[-1:]), 2.6, "curve")]


def _thinned(points: Points) -> Points:
    """The lowest and the highest point of each stretch, where there are more than can be seen."""
    stretch = -(-2 * len(points) // MOST_POINTS)
    if stretch <= 2:
        return points
    thinned: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        thinned += sorted(ends)
    return thinned


def _marks(axes: Axes, points: Points, ink: str, outline: str) -> Markup:
    every = -(-len(points) // MOST_POINTS)
    places = axes.places(points[::-every])
    path = "".join(outline.format(x=x, top=y - 4) for x, y in places)
    return tag("path", d=path, fill=f"var(--kv-{ink})", stroke="var(--kv-fg)")


# ---- bands: several runs in one drawing ----------------------------------------------------------

COLOURS = 7
DASHES = ("", "7 3", "2 3", "9 3 2 3")
DOTTED = 40
"""Up to so many points, each of them is marked."""
LINE = 13.0
"""Between the numbers of two curves that end at the same height."""


@dataclass(frozen=True, slots=True)
class Pen:
    """Look of one group's curve: number, colour, dashes."""

    index: int

    @property
    def ink(self) -> str:
        """A colour of the theme."""
        return f"s{self.index % COLOURS + 1}"

    @property
    def dashes(self) -> str | None:
        """As SVG writes them; None for an unbroken line."""
        return DASHES[self.index % len(DASHES)] or None

    def sample(self) -> Markup:
        """A short line, for the legend."""
        line = stroke("M1 7H35", self.ink, 2.4, self.dashes)
        svg = tag("svg", line, viewBox="0 0 36 14", width="36", height="14")
        return tag("span", svg, class_="kv-pen", aria_hidden="true")


def band_panels(metrics: Sequence[str], groups: Sequence[Mapping[str, Band]]) -> Markup:
    """A panel for each metric, with the bands of all groups that logged it.

    A band reaches from the lowest to the highest run of a group; a line is their mean.
    """
    return tag("div", *(_band_panel(name, groups) for name in metrics), class_="kv-bands")


def _band_panel(name: str, groups: Sequence[Mapping[str, Band]]) -> Markup:
    bands = [(i, group[name]) for i, group in enumerate(groups) if name in group]
    full = f" {name}" if short_name(name) != name else ""
    head = tag(
        "div",
        tag("b", shorten(short_name(name), 60)),
        tag("span", shorten(full, 60), class_="kv-muted"),
        class_="kv-panel-head",
        title=meaning(name).words or None,
    )
    return tag("div", head, _bands(name, bands), class_="kv-panel")


def _bands(name: str, bands: Sequence[tuple[int, Band]]) -> Markup:
    """Round values left of the drawing, round steps below it, and the curves of all groups."""
    steps = [step for _, band in bands for step in band.steps]
    values = [value for _, band in bands for value in (*band.low, *band.high)]
    first, last, levels = min(steps), max(steps), _levels(values)
    axes = Axes(500, 235, (48, 26, 10, 32), (first, last), (levels[0], levels[-1]))
    parts = [axes.rules(levels), *axes.labels(levels)]
    for step in ticks(first, last, 6):
        if step == int(step) and first <= step <= last:
            parts.append(text(axes.x(step), axes.floor + 15, f"{int(step)}", "middle"))
    parts.append(text(axes.right, axes.height - 4, "step", "end"))
    parts += [_area(axes, band, Pen(i)) for i, band in bands if band.low != band.high]
    for i, band in bands:
        places = axes.places(zip(band.steps, band.mean, strict=True))
        parts.append(stroke(polyline(places), Pen(i).ink, 2, Pen(i).dashes))
        if len(places) <= DOTTED:
            parts.append(dots(places, 2, Pen(i).ink))
    spoken = "; ".join(
        f"curve {i + 1} from {number(band.mean[0], 3)} to {number(band.mean[-1], 3)}"
        for i, band in bands
    )
    words = f"{shorten(short_name(name), 60)}: {spoken}"
    return drawing(axes.svg(*parts, *_end_numbers(axes, bands)), words)


def _levels(values: Sequence[float]) -> list[float]:
    """Round values around those that are drawn; from 0 where the curve is near it."""
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    low, high = min(finite), max(finite)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
        room = abs(low) / 2 or 0.5
        low, high = low - room, high + room
    elif 0 <= low < 0.4 * high:
        low = 0.0
    return ticks(low, high, 4)


def _area(axes: Axes, band: Band, pen: Pen) -> Markup:
    there = axes.places(zip(band.steps, band.high, strict=True))
    back = axes.places(zip(band.steps, band.low, strict=True))
    path = polyline([*there, *reversed(back)]) + "Z"
    return tag("path", d=path, fill=f"var(--kv-{pen.ink})", opacity="0.16")


def _end_numbers(axes: Axes, bands: Sequence[tuple[int, Band]]) -> Iterator[Markup]:
    """Each curve's number at its end, apart from those of its neighbours."""
    ends = [(i, axes.x(band.steps[-1]), axes.y(band.mean[-1])) for i, band in bands]
    ends.sort(key=lambda end: end[2])
    heights = _apart([y for *_, y in ends], axes.floor)
    for (index, x, y), height in zip(ends, heights, strict=True):
        yield stroke(f"M{x + 2:.1f} {y:.1f}L{x + 8:.1f} {height:.1f}", "muted")
        yield text(x + 9, height + 4, str(index + 1), "start", "fg", weight="600")


def _apart(heights: Sequence[float], floor: float) -> list[float]:
    """Heights from above to below, moved until there is a line between each two."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + LINE)
    for below, i in enumerate(reversed(range(len(placed)))):
        placed[i] = min(placed[i], floor - LINE * below)
    return placed
