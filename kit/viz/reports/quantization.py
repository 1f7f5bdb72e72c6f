"""`QuantizationReport`: the error of each weight by layer and projection, darker where larger."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from kit.reports.quantization import QuantizationReport, QuantizedWeight
from kit.utils.formatting import columns, number
from kit.viz.html import Column, drawing, facts, join, note, table, tag, title
from kit.viz.render import register
from kit.viz.svg import Axes, box, text

CELL, WIDE = 16, 22
"""Height of a weight's cell, and its greatest width, in CSS pixels."""
NAMES, ROOM = 92, 640
"""Width of the projections' names, and of all layers together at most."""
EVERY = 40
"""Pixels at least between two numbers of layers."""
BLOCKS = "▁▂▃▄▅▆▇█"
NOTE = (
    "error: root mean square of what rounding changes, as a share of the weight's own. 50%, 99%: "
    "so many of its numbers change by no more than this, largest: all of them, in root mean "
    "squares of the weight. lost: numbers that become 0."
)


def _html(report: QuantizationReport) -> Markup:
    """Title, headline numbers, a cell for each weight, and the worst ones."""
    heads, rows = _table(report)
    return join(
        title(_title(report)),
        facts(_facts(report)),
        _picture(report),
        table(heads, rows),
        note(NOTE),
    )


def _plain(report: QuantizationReport) -> str:
    heads, rows = _table(report)
    lines = [
        [
            part,
            _blocks(values, report.worst[0].error),
            f"{_percent(min(values))} to {_percent(max(values))}",
        ]
        for part in report.parts
        if (values := [w.error for n in report.layers if (w := report.of(n, part))])
    ]
    return "\n".join(
        (
            _title(report),
            f"  error {_percent(report.error)} over all weights; by layer, first to last:",
            columns(lines),
            columns([[head.name for head in heads], *rows]),
            f"  {NOTE}",
        )
    )


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def _blocks(values: Sequence[float], top: float) -> str:
    """A block for each value, as high as its share of the largest of all weights."""
    highest = len(BLOCKS) - 1
    return "".join(BLOCKS[round(highest * value / top) if top else 0] for value in values)


def _title(report: QuantizationReport) -> str:
    return f"{report.model} in {report.how}: what rounding does to {len(report.weights)} weights"


def _facts(report: QuantizationReport) -> list[tuple[str, str]]:
    worst = report.worst[0]
    lost = sum(w.numbers * w.lost for w in report.weights) / sum(w.numbers for w in report.weights)
    return [
        ("error", _percent(report.error)),
        ("worst weight", _percent(worst.error)),
        ("numbers that become 0", _percent(lost)),
        ("layers", f"{len(report.layers):,}"),
    ]


def _table(report: QuantizationReport) -> tuple[list[Column], list[list[str]]]:
    names = ("error", "50%", "99%", "largest", "lost")
    heads = [Column("weight", "mid"), *(Column(name, "num") for name in names)]
    return heads, [_row(weight) for weight in report.worst]


def _row(weight: QuantizedWeight) -> list[str]:
    changes = (number(value, 2) for value in (weight.half, weight.most, weight.largest))
    return [weight.name, _percent(weight.error), *changes, _percent(weight.lost)]


def _picture(report: QuantizationReport) -> Markup:
    """A row for each projection, a column for each layer."""
    layers, parts = report.layers, report.parts
    wide = min(WIDE, ROOM / len(layers))
    size = (NAMES + wide * len(layers) + 8, CELL * len(parts) + 24)
    axes = Axes(*size, (NAMES, 8, 4, 20), (0, len(layers)), (len(parts), 0))
    top = report.worst[0].error or 1.0
    drawn = []
    for row, part in enumerate(parts):
        y = axes.top + CELL * row
        drawn.append(text(NAMES - 8, y + CELL - 4, part, "end"))
        for place, layer in enumerate(layers):
            if weight := report.of(layer, part):
                shade = box(
                    axes.left + wide * place, y, wide - 1, CELL - 1, "d3",
                    fill_opacity=f"{0.08 + 0.92 * weight.error / top:.2f}",
                )  # fmt: skip
                words = f"{weight.name}: {_percent(weight.error)}"
                drawn.append(tag("g", tag("title", words), shade))
    step = max(1, round(EVERY / wide))
    for place in range(0, len(layers), step):
        x = axes.left + wide * (place + 0.5)
        drawn.append(text(x, axes.floor + 14, str(layers[place]), "middle"))
    return drawing(
        axes.svg(*drawn),
        f"Error of each weight by layer (across) and projection; the darkest is {_percent(top)}.",
    )


register(QuantizationReport, _html, _plain)
