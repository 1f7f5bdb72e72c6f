"""Small curves that cost a millisecond, for what is drawn again and again while training runs.

matplotlib's are for what stays (`kit.viz.plots`): a figure of six panels takes it a third of a
second, which is longer than a step of the embedded model.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from kit.tracking.catalog import meaning, short_name
from kit.utils.formatting import count, number, shorten
from kit.viz.curves import Curve, Points, smooth
from kit.viz.html import drawing, note, tag
from kit.viz.plots import SMOOTHED_FROM, in_words

WIDTH, HEIGHT = 300.0, 100.0


LEFT, RIGHT, TOP, BOTTOM = 50.0, 6.0, 8.0, 19.0
"""Margins, where the numbers of the axes are."""


MOST_POINTS = 150
"""A panel is no wider than so many points can be told apart."""


def panels(drawn: Sequence[Curve]) -> Markup:
    """One panel a curve, beside each other as the page is wide."""
    return tag("div", *map(_panel, drawn), class_="kv-panels")


def _panel(curve: Curve) -> Markup:
    last = curve.points[-1][1] if curve.points else None
    evaluations = [
        note(f"◆ {shorten(name, 40)} {number(points[-1][1], 3)}")
        for name, points in curve.evaluations.items()
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
        _drawing(curve),
        *evaluations,
        note(dropped) if curve.dropped else None,
        class_="kv-panel",
    )


def _drawing(curve: Curve) -> Markup:
    shown = [*curve.points, *(p for points in curve.evaluations.values() for p in points)]
    if not shown:
        words = "no finite value" if curve.dropped else "nothing yet"
        return tag("div", words, class_="kv-panel-empty")
    scale = _Scale(shown)
    marks = [
        tag("path", d=_diamonds(scale, points), fill="var(--kv-point)", stroke="var(--kv-fg)")
        for points in curve.evaluations.values()
    ]
    box = f"0 0 {WIDTH:g} {HEIGHT:g}"
    svg = tag("svg", *scale.axes(), *_line(scale, curve.points), *marks, viewBox=box)
    return drawing(svg, in_words(curve))


class _Scale:
    """From steps and values to places in the drawing."""

    def __init__(self, points: Points) -> None:
        steps, values = [s for s, _ in points], [v for _, v in points]
        self.first, self.last = min(steps), max(steps)
        self.low, self.high = min(values), max(values)
        flat = self.high - self.low <= 1e-12 * max(abs(self.low), abs(self.high), 1e-300)
        room = (abs(self.low) / 2 or 0.5) if flat else 0.0
        self._bottom, self._top = self.low - room, self.high + room
        self.flat = flat

    def at(self, step: float, value: float) -> tuple[float, float]:
        wide, high = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        across = (step - self.first) / (self.last - self.first) if self.last > self.first else 0.5
        # Halved, because the span of two finite numbers may not be one.
        up = (value / 2 - self._bottom / 2) / (self._top / 2 - self._bottom / 2)
        return LEFT + wide * across, TOP + high * (1 - up)

    def axes(self) -> list[Markup]:
        """Two quiet lines at the highest and the lowest value; the first and the last step."""
        top, bottom = TOP, HEIGHT - BOTTOM
        lines = f"M{LEFT:g} {top:g}H{WIDTH - RIGHT:g}M{LEFT:g} {bottom:g}H{WIDTH - RIGHT:g}"
        words = [
            _label(LEFT - 5, self.at(self.first, self.low)[1] + 4, number(self.low, 3), "end"),
            _label(WIDTH - RIGHT, HEIGHT - 4, f"step {self.last:g}", "end"),
        ]
        if self.last > self.first:
            words.append(_label(LEFT, HEIGHT - 4, f"step {self.first:g}"))
        if not self.flat:
            words.append(_label(LEFT - 5, top + 4, number(self.high, 3), "end"))
        return [tag("path", d=lines, stroke="var(--kv-track)", fill="none"), *words]


def _label(x: float, y: float, words: str, anchor: str | None = None) -> Markup:
    return tag(
        "text", words, x=f"{x:g}", y=f"{y:g}", text_anchor=anchor, fill="var(--kv-muted)",
        font_size="11.5",
    )  # fmt: skip


def _line(scale: _Scale, points: Points) -> list[Markup]:
    """The curve: dots where they are few, a running mean over a faint line where they are many."""
    if not points:
        return []
    if len(points) < SMOOTHED_FROM:
        dots = "".join(_dot(*scale.at(*point), 2.2) for point in points)
        return [_stroke(scale, points, 1.6), tag("path", d=dots, fill="var(--kv-curve)")]
    window, every = max(3, len(points) // 20), -(-len(points) // MOST_POINTS)
    thin, thick = _thinned(points), smooth(points, window, every)
    end = tag("path", d=_dot(*scale.at(*points[-1]), 2.6), fill="var(--kv-curve)")
    return [_stroke(scale, thin, 0.8, "0.55"), _stroke(scale, thick, 2.0), end]


def _stroke(scale: _Scale, points: Points, width: float, opacity: str | None = None) -> Markup:
    places = (scale.at(*point) for point in points)
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
    return tag(
        "path", d=path, fill="none", stroke="var(--kv-curve)", stroke_width=f"{width:g}",
        opacity=opacity,
    )  # fmt: skip


def _thinned(points: Points) -> Points:
    """The lowest and the highest point of each stretch, where there are more than can be seen."""
    stretch = -(-2 * len(points) // MOST_POINTS)
    if stretch <= 2:
        return points
    kept: Points = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def _dot(x: float, y: float, radius: float) -> str:
    r = f"{radius:g}"
    return (
        f"M{x - radius:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * radius:g} 0a{r} {r} 0 1 0 -{2 * radius:g} 0"
    )


def _diamonds(scale: _Scale, points: Points) -> str:
    step = -(-len(points) // MOST_POINTS)
    places = (scale.at(*point) for point in points[::-step])
    return "".join(f"M{x:.1f} {y - 4:.1f}l4 4l-4 4l-4 -4z" for x, y in places)


def caption(drawn: Sequence[Curve]) -> Markup | None:
    """What the lines mean, where a panel has a mean over its line."""
    many = any(len(curve.points) >= SMOOTHED_FROM for curve in drawn)
    return note("Thin: each step. Thick: running mean over a twentieth of them.") if many else None


def shifted(curve: Curve, by: int) -> Curve:
    """The same curve, its steps counted from another beginning."""
    if not by:
        return curve
    points = [(step + by, value) for step, value in curve.points]
    evaluations = {
        name: [(step + by, value) for step, value in marks]
        for name, marks in curve.evaluations.items()
    }
    return Curve(curve.name, points, curve.dropped, evaluations)
