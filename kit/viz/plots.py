"""Curves of a training run: SVG in the notebook's colours, PNG for files, text for a terminal.

Drawn with matplotlib's object interface, so that nothing here touches the plots a notebook makes
through pyplot. The SVG is cleaned for use inside a page: no addresses, no style rule that would
reach the rest of the notebook, colours as variables of `kit.viz.theme`.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from kit.reports import REWARD, TrainReport
from kit.tracking.catalog import short_name
from kit.utils.display import Picture
from kit.utils.formatting import count, number, shorten
from kit.viz.curves import (
    SMOOTHED_FROM,
    Curve,
    Row,
    evaluations_of,
    in_words,
    rows_of,
    run_curves,
    smooth,
)
from kit.viz.html import drawing, note, page, tag, title
from kit.viz.svg import LEAST, SET_MARKS
from kit.viz.theme import LIGHT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


CURVES = (REWARD, "rollout/response_len/mean", "train/entropy_loss", "train/grad_norm")
"""What is drawn of a run unless asked otherwise."""


# matplotlib writes colours as numbers. These stand for a role and become a variable in the page.
_ROLES = {
    "#010203": "fg",
    "#040506": "muted",
    "#070809": "line",
    "#0a0b0c": "curve",
    "#0d0e0f": "point",
    "#101112": "bg",
    "#131415": "track",
    "#161718": "s3",
    "#191a1b": "s4",
    "#1c1d1e": "s5",
}
_INK = {role: colour for colour, role in _ROLES.items()}
_MARKERS = "Ds^v"
"""Of held-out sets, in the order of `kit.viz.svg.SET_MARKS`."""
PANEL, ALONE = (4.2, 2.4), (6.4, 3.4)
"""Width and height in inches of one curve among several, and of one alone."""


def curves(report: TrainReport, names: Sequence[str] = CURVES) -> Picture:
    """Metrics of a run over its steps, one panel each, with evaluations over the reward."""
    drawn = run_curves(rows_of(report), names, evaluations_of(report))
    html = page(title("Curves of the run"), curves_svg(drawn), *_notes(drawn))
    visible = [c for c in drawn if _has_points(c)]
    png = _write(_figure(visible, LIGHT), "png", dpi=110) if visible else b""
    return Picture(html, _curves_plain(drawn), base64.b64encode(png).decode())


def curves_svg(drawn: Sequence[Curve]) -> Markup | None:
    """The curves that have points, as SVG to put into a page; None where there are none.

    Each is a drawing of its own, so that a narrow page has them below each other.
    """
    visible = [curve for curve in drawn if _has_points(curve)]
    panels = []
    for curve in visible:
        words = in_words(curve)
        size = PANEL if len(visible) > 1 else ALONE
        svg = _inline(_svg(_figure([curve], _INK, size=size), salt=words), words)
        panels.append(tag("div", svg, class_="kv-panel"))
    if len(panels) < 2:
        return panels[0] if panels else None
    return tag("div", *panels, class_="kv-bands")


def save_curve(
    rows: Sequence[Row],
    path: str | Path,
    names: Sequence[str] = (REWARD,),
    heading: str = "",
    dpi: int = 150,
) -> Path:
    """Write metrics over steps as a PNG, evaluations (`eval/...`) as marks over the reward.

    Args:
        rows: one mapping of metrics a step. `step` numbers it where present, else its position.
        path: where the file goes; its directory is made if missing.
        names: the metrics, one panel each.
        heading: over the whole picture; none if empty.
        dpi: dots an inch; a panel is about 5 by 3 inches.

    A run without a single number still gives a picture, which says so.
    """
    drawn = run_curves(rows, names, {})
    figure = _figure(drawn, LIGHT, heading)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(_write(figure, "png", dpi=dpi))
    return target


def _curves_plain(drawn: Sequence[Curve]) -> str:
    """First and last value of each curve, for a terminal."""
    return "\n".join(["Curves of the run", *(f"  {in_words(curve)}" for curve in drawn)])


def _notes(drawn: Sequence[Curve]) -> list[Markup]:
    """What is not in the picture, and why."""
    missing = [shorten(c.name, 60) for c in drawn if not _has_points(c) and not c.dropped]
    notes = [note(f"Not logged: {', '.join(missing)}.")] if missing else []
    return notes + [
        note(f"! {shorten(curve.name, 60)}: {count(curve.dropped, 'step')} without a finite value")
        for curve in drawn
        if curve.dropped
    ]


def _has_points(curve: Curve) -> bool:
    return bool(curve.points or curve.evaluations)


def _figure(
    drawn: Sequence[Curve],
    ink: dict[str, str],
    heading: str = "",
    size: tuple[float, float] | None = None,
) -> Figure:
    from matplotlib.figure import Figure

    across = 1 if len(drawn) == 1 else 2
    down = max(-(-len(drawn) // across), 1)
    if size is None:
        size = ALONE if across == 1 else (2 * PANEL[0], PANEL[1] * down)
    figure = Figure(figsize=size, layout="constrained", facecolor=ink["bg"])
    for index, curve in enumerate(drawn):
        _panel(figure.add_subplot(down, across, index + 1), curve, ink)
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.set(h_pad=0.1, w_pad=0.1)  # type: ignore[call-arg]
    if heading:
        figure.suptitle(shorten(heading, 90), color=ink["fg"], fontsize=12, parse_math=False)
    return figure


def _panel(axes: Axes, curve: Curve, ink: dict[str, str]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_facecolor(ink["bg"])
    axes.set_title(
        shorten(short_name(curve.name), 40),
        loc="left",
        fontsize=10.5,
        color=ink["fg"],
        parse_math=False,
    )
    if short_name(curve.name) != curve.name:
        axes.set_title(
            shorten(curve.name, 40), loc="right", fontsize=8, color=ink["muted"], parse_math=False
        )
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(ink["line"])
    axes.grid(axis="y", color=ink["track"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=ink["muted"], labelsize=8.5, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    axes.set_xlabel("step", fontsize=8.5, color=ink["muted"])
    _draw(axes, curve, ink)


def _draw(axes: Axes, curve: Curve, ink: dict[str, str]) -> None:
    if not _has_points(curve):
        words = "no finite value" if curve.dropped else "not logged"
        axes.text(0.5, 0.5, words, ha="center", transform=axes.transAxes, color=ink["muted"])
        return
    steps, values = [s for s, _ in curve.points], [v for _, v in curve.points]
    many = len(values) >= SMOOTHED_FROM
    axes.plot(
        steps,
        values,
        color=ink["curve"],
        linewidth=0.8 if many else 1.6,
        alpha=0.5 if many else 1.0,
        marker="" if many else "o",
        markersize=3.5,
        label="each step",
    )
    if many:
        window = max(3, len(values) // 20)
        means = smooth(curve.points, window)
        axes.plot(
            [s for s, _ in means],
            [v for _, v in means],
            color=ink["curve"],
            linewidth=2.0,
            label=f"mean of {window} steps",
        )
    for index, (name, points) in enumerate(curve.evaluations.items()):
        axes.plot(
            [s for s, _ in points],
            [v for _, v in points],
            color=ink[SET_MARKS[index % len(SET_MARKS)][1]],
            linewidth=1.0,
            linestyle=":",
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=6,
            markeredgecolor=ink["fg"],
            markeredgewidth=0.7,
            label=shorten(name, 40),
        )
    if many or curve.evaluations:
        legend = axes.legend(fontsize=8, frameon=False, labelcolor=ink["fg"])
        for entry in legend.get_texts():
            entry.set_parse_math(False)


def _svg(figure: Figure, salt: str) -> str:
    """The figure as SVG with real text; ids are made from `salt`, so that none is used twice."""
    import matplotlib

    digest = hashlib.sha256(salt.encode()).hexdigest()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": digest}):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        return _write(figure, "svg", metadata=nothing).decode()


def _write(figure: Figure, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A data set may be named in letters that the plot's font lacks: boxes, not warnings.
        warnings.filterwarnings("ignore", message="Glyph .* missing", category=UserWarning)
        figure.savefig(buffer, format=kind, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def _inline(svg: str, words: str) -> Markup:
    """SVG as part of a page: only its drawing, in the page's colours, with words for readers."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg)
    for colour, role in _ROLES.items():
        svg = svg.replace(colour, f"var(--kv-{role})")
    if width := re.match(r'<svg[^>]* width="([\d.]+)pt"', svg):
        svg = f'<svg style="min-width:{LEAST * float(width[1]):.0f}pt"{svg[4:]}'
    return drawing(Markup(svg), words)


LARGEST = 1e30
"""Values beyond it are not drawn: plotext's own arithmetic overflows there."""


def terminal_curve(
    values: Sequence[float], title: str = "", width: int = 72, height: int = 12
) -> str:
    """The values over their position, drawn in `width` x `height` characters without colour.

    Values that are not finite leave a gap; with nothing to draw, the title says so in one line.
    """
    words = shorten(title, max(width, 10))
    # plotext ends the whole process on a NaN, so none may reach it.
    points = [
        (position, float(value))
        for position, value in enumerate(values)
        if math.isfinite(value) and abs(value) <= LARGEST
    ]
    if not points:
        return f"{words or 'curve'}: no values"
    drawing = _draw_terminal(points, max(width, 20), max(height, 5) - (1 if words else 0))
    return f"{words}\n{drawing}" if words else drawing


def _draw_terminal(points: list[tuple[int, float]], width: int, height: int) -> str:
    import plotext  # type: ignore[import-untyped]

    steps, values = [s for s, _ in points], [v for _, v in points]
    low, high = min(values), max(values)
    if low == high:  # a flat line has no scale of its own: draw it in the middle
        margin = abs(low) / 2 or 0.5
        low, high = low - margin, high + margin
    first, last = (steps[0], steps[-1]) if len(steps) > 1 else (steps[0] - 1, steps[0] + 1)
    figure = plotext.figure
    plotext.terminal.limit(False, False)
    try:
        figure.clear()
        figure.plot_size(width, height)
        signal = figure.signal(steps, values, marker="braille")
        figure.draw(signal.lines() if len(points) > 1 else signal)
        middle = (low + high) / 2
        figure.ruler("y").lim(low, high).ticks(
            [low, middle, high], [number(tick, 3) for tick in (low, middle, high)]
        )
        marks = sorted({steps[0], (steps[0] + steps[-1]) // 2, steps[-1]})
        figure.ruler("x").lim(first, last).ticks(marks, [str(mark) for mark in marks])
        drawn: str = figure.build().string(True)
    finally:
        figure.clear()
        plotext.terminal.limit(True, True)
    return "\n".join(line.rstrip() for line in drawn.rstrip("\n").split("\n"))
