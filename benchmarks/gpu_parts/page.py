"""The table in the terminal, and docs/performance.md: both from a results file alone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from benchmarks.gpu_parts.results import Results

COLUMNS = ("", "measured", "reference", "ratio", "bound", "of the bound", "target", "met")


def number(value: float | None, unit: str = "") -> str:
    """Three digits that count, or all in front of the point; a dash for what is not there."""
    if value is None:
        return "–"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {unit}".strip()


def cells(row: dict[str, Any]) -> list[str]:
    """A row as text, in the order of `COLUMNS`."""
    unit, share = row["unit"], row["share"]
    reference = number(row["reference"], unit)
    return [
        row["name"],
        row["note"] if row["value"] is None else number(row["value"], unit),
        f"{reference} ({row['against']})" if row["against"] else "",
        f"{row['ratio']:.2f} x" if row["ratio"] else "",
        number(row["bound"], unit) if row["bound"] else "",
        f"{100 * share:.0f}%" if share else "",
        row["target"],
        {True: "yes", False: "no", None: ""}[row["met"]],
    ]


def show(results: Results) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 180)
    for section, rows in _sections(results):
        table = Table(title=section, title_justify="left", expand=False)
        for column in COLUMNS:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*cells(row))
        console.print(table)
    for line in _not_done(results):
        console.print(line, markup=False)


def page(results: Results) -> str:
    """The whole page, as Markdown."""
    card, work = results.card, results.workload
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    samples = work["prompts"] * work["group"]
    lines = [
        "# Performance",
        "",
        f"Measured on one **{card['name']}** ({card['total'] / (1 << 30):.0f} GiB"
        + (f", driver {card['driver']}" if card.get("driver") else "")
        + f") with {versions}. This page is made from the results of",
        "",
        "```",
        *results.commands,
        "```",
        "",
        f"The model has {results.model['parameters'] / 1e6:,.0f} M parameters (the shape of "
        f"{'Qwen3-0.6B' if not work['small'] else 'a tiny model'}, random weights). An iteration "
        f"is {samples} responses of {work['response_tokens']} tokens, {work['group']} to each of "
        f"{work['prompts']} prompts of {work['prompt_tokens']} tokens, graded, and one optimizer "
        "step over all of them.",
        "",
        "- *Reference*: measured in the same run on the same card, in a process of its own. "
        "*Ratio*: how many times as good as it.",
        "- *Bound*: the floor that the bytes and operations of the task give at the card's own "
        "rates, which are the first table. *Of the bound*: 100% is as good as it can be.",
        "- Values are medians of repetitions after a first one, which pays for what is made once. "
        "*MFU*: operations of forward and backward pass, the output embedding counted for response "
        "tokens only and nothing recomputed counted at all, over the measured matrix rate.",
    ]
    if chosen := results.get("memory", "chosen"):
        settings = ", ".join(f"`{name}: {value}`" for name, value in chosen.items())
        lines += [f"- The session's memory plan chose {settings}."]
    for section, rows in _sections(results):
        lines += ["", f"## {section}", "", *_markdown_table(rows), *_floors(rows)]
    if left := _not_done(results):
        lines += ["", "## Not measured", "", *(f"- {line}" for line in left)]
    return "\n".join(lines) + "\n"


def _sections(results: Results) -> list[tuple[str, list[dict[str, Any]]]]:
    return [(name, list(rows)) for name, rows in groupby(results.rows, key=lambda r: r["section"])]


def _markdown_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Only columns in which something stands."""
    table = [cells(row) for row in rows]
    used = [i for i in range(len(COLUMNS)) if i < 2 or any(line[i] for line in table)]

    def line(values: Sequence[str]) -> str:
        return "| " + " | ".join(values[i].replace("|", "\\|") for i in used) + " |"

    rule = "|" + "|".join("---" if i in (0, 2, 6, 7) else "---:" for i in used) + "|"
    return [line(COLUMNS), rule, *map(line, table)]


def _floors(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What the bounds count, and what there is to say of single rows."""
    floors = dict.fromkeys(row["floor"] for row in rows if row["floor"])
    notes = [f"- {row['name']}: {row['note']}" for row in rows if row["note"] and row["value"]]
    lines = [f"Bounds: {'; '.join(floors)}."] if floors else []
    return [text for part in (lines, notes) if part for text in ("", *part)]


def _not_done(results: Results) -> list[str]:
    return [
        f"{name}: {part.state}, {part.message.splitlines()[0] if part.message else 'cut off'}"
        for name, part in results.parts.items()
        if part.state != "done"
    ]
