"""A curve in a terminal, for the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from kit.viz.text import number, shorten

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
    drawing = _draw(points, max(width, 20), max(height, 5) - (1 if words else 0))
    return f"{words}\n{drawing}" if words else drawing


def _draw(points: list[tuple[int, float]], width: int, height: int) -> str:
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
