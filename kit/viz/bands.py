"""Several curves in one drawing, each with a band from its lowest to its highest run.

A curve is told from the others by its number, which stands at its end, by its dashes and by its
colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from markupsafe import Markup

from kit.tracking.catalog import meaning, short_name
from kit.utils.formatting import number, shorten
from kit.viz.html import drawing, tag

if TYPE_CHECKING:
    from kit.reports.runs import Band


WIDTH, HEIGHT = 500.0, 235.0


LEFT, RIGHT, TOP, BOTTOM = 48.0, 26.0, 10.0, 32.0
"""Margins: numbers of the axes, and the curves' own at the right."""


COLOURS = 7


_DASHES = ("", "7 3", "2 3", "9 3 2 3")


_DOTS = 40
"""Up to so many points, each of them is marked."""


_LINE = 13.0
"""Between the numbers of two curves that end at the same height."""


@dataclass(frozen=True, slots=True)
class Pen:
    """How the curve of one group looks."""

    index: int

    @property
    def colour(self) -> str:
        """A variable of the theme."""
        return f"var(--kv-s{self.index % COLOURS + 1})"

    @property
    def dashes(self) -> str | None:
        """As SVG writes them; None for an unbroken line."""
        return _DASHES[self.index % len(_DASHES)] or None

    def sample(self) -> Markup:
        """A short line, for the legend."""
        line = tag(
            "path", d="M1 7H35", stroke=self.colour, stroke_width="2.4", fill="none",
            stroke_dasharray=self.dashes,
        )  # fmt: skip
        svg = tag("svg", line, viewBox="0 0 36 14", width="36", height="14")
        return tag("span", svg, class_="kv-pen", aria_hidden="true")


def band_panels(metrics: Sequence[str], groups: Sequence[Mapping[str, Band]]) -> Markup:
    """A panel for each metric, with the bands of all groups that logged it."""
    return tag("div", *(_panel(name, groups) for name in metrics), class_="kv-bands")


def _panel(name: str, groups: Sequence[Mapping[str, Band]]) -> Markup:
    bands = [(i, group[name]) for i, group in enumerate(groups) if name in group]
    full = f" {name}" if short_name(name) != name else ""
    head = tag(
        "div",
        tag("b", shorten(short_name(name), 60)),
        tag("span", shorten(full, 60), class_="kv-muted"),
        class_="kv-panel-head",
        title=meaning(name).words or None,
    )
    return tag("div", head, _drawing(name, bands), class_="kv-panel")


def _drawing(name: str, bands: Sequence[tuple[int, Band]]) -> Markup:
    axes = _Axes(
        [step for _, band in bands for step in band.steps],
        [value for _, band in bands for value in (*band.low, *band.high)],
    )
    parts = [*axes.drawn()]
    parts += [_area(axes, band, Pen(i)) for i, band in bands if band.low != band.high]
    parts += [part for i, band in bands for part in _line(axes, band, Pen(i))]
    parts += _numbers(axes, bands)
    svg = tag("svg", *parts, viewBox=f"0 0 {WIDTH:g} {HEIGHT:g}")
    spoken = "; ".join(
        f"curve {i + 1} from {number(band.mean[0], 3)} to {number(band.mean[-1], 3)}"
        for i, band in bands
    )
    return drawing(svg, f"{shorten(short_name(name), 60)}: {spoken}")


class _Axes:
    """From steps and values to places in the drawing."""

    def __init__(self, steps: Sequence[int], values: Sequence[float]) -> None:
        finite = [value for value in values if math.isfinite(value)] or [0.0]
        self.first, self.last = min(steps), max(steps)
        low, high = min(finite), max(finite)
        if high - low <= 1e-9 * max(abs(low), abs(high), 1e-30):
            room = abs(low) / 2 or 0.5
            low, high = low - room, high + room
        elif low >= 0 and low < 0.4 * high:
            low = 0.0  # a curve near zero is read against it
        self.ticks = [*_ticks(low, high, 4)]
        self.low, self.high = min(low, self.ticks[0]), max(high, self.ticks[-1])

    def x(self, step: float) -> float:
        wide = WIDTH - LEFT - RIGHT
        across = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        return LEFT + wide * across

    def y(self, value: float) -> float:
        up = (value - self.low) / (self.high - self.low)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(up, 0.0), 1.0))

    def drawn(self) -> Iterator[Markup]:
        """Quiet lines across with their values, the steps below."""
        floor = HEIGHT - BOTTOM
        for tick in self.ticks:
            y = self.y(tick)
            path = f"M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"
            yield tag("path", d=path, stroke="var(--kv-track)", fill="none")
            yield _words(LEFT - 6, y + 4, number(round(tick, 12), 3), "end")
        for tick in _ticks(self.first, self.last, 6):
            if tick == int(tick) and self.first <= tick <= self.last:
                yield _words(self.x(tick), floor + 15, f"{int(tick)}", "middle")
        yield _words(WIDTH - RIGHT, HEIGHT - 4, "step", "end")


def _ticks(low: float, high: float, about: int) -> Iterator[float]:
    """Round numbers from below `low` to above `high`, about so many."""
    if high <= low:
        yield low
        return
    size = (high - low) / about
    power = 10.0 ** math.floor(math.log10(size))
    unit = next(power * factor for factor in (1, 2, 2.5, 5, 10) if size <= power * factor * 1.001)
    first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
    yield from (unit * place for place in range(first, last + 1))


def _area(axes: _Axes, band: Band, pen: Pen) -> Markup:
    there = [(axes.x(s), axes.y(h)) for s, h in zip(band.steps, band.high, strict=True)]
    back = [(axes.x(s), axes.y(v)) for s, v in zip(band.steps, band.low, strict=True)]
    return tag("path", d=_path([*there, *reversed(back)]) + "Z", fill=pen.colour, opacity="0.16")


def _line(axes: _Axes, band: Band, pen: Pen) -> Iterator[Markup]:
    points = [(axes.x(s), axes.y(v)) for s, v in zip(band.steps, band.mean, strict=True)]
    yield tag(
        "path", d=_path(points), fill="none", stroke=pen.colour, stroke_width="2",
        stroke_dasharray=pen.dashes,
    )  # fmt: skip
    if len(points) <= _DOTS:
        dots = "".join(f"M{x - 2:.1f} {y:.1f}a2 2 0 1 0 4 0a2 2 0 1 0 -4 0" for x, y in points)
        yield tag("path", d=dots, fill=pen.colour)


def _numbers(axes: _Axes, bands: Sequence[tuple[int, Band]]) -> list[Markup]:
    """Each curve's number at its end, apart from those of its neighbours."""
    ends = [(i, axes.x(band.steps[-1]), axes.y(band.mean[-1])) for i, band in bands]
    ends.sort(key=lambda end: end[2])
    heights = _apart([y for *_, y in ends], HEIGHT - BOTTOM)
    drawn = []
    for (index, x, y), height in zip(ends, heights, strict=True):
        name = _words(x + 9, height + 4, str(index + 1), "start", weight="600", fill="fg")
        line = f"M{x + 2:.1f} {y:.1f}L{x + 8:.1f} {height:.1f}"
        drawn += [tag("path", d=line, stroke="var(--kv-muted)", fill="none"), name]
    return drawn


def _apart(heights: Sequence[float], floor: float) -> list[float]:
    """Heights from above to below, moved until there is a line between each two."""
    placed = list(heights)
    for i in range(1, len(placed)):
        placed[i] = max(placed[i], placed[i - 1] + _LINE)
    for below, i in enumerate(reversed(range(len(placed)))):
        placed[i] = min(placed[i], floor - _LINE * below)
    return placed


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def _words(
    x: float, y: float, words: str, anchor: str, weight: str | None = None, fill: str = "muted"
) -> Markup:
    return tag(
        "text", words, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor,
        fill=f"var(--kv-{fill})", font_size="11.5", font_weight=weight,
    )  # fmt: skip
