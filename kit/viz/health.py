"""`CheckReport`: the invariants of a healthy start, each with its value, its bound and a mark."""

from __future__ import annotations

from markupsafe import Markup

from kit.reports import CheckReport
from kit.viz.html import Column, badge, fold, join, note, table, title
from kit.viz.mismatch import mismatch_html
from kit.viz.text import columns, duration, number, shorten

MARKS = {True: "✓", False: "✗", None: "–"}


def check_title(report: CheckReport) -> str:
    """`Healthy start: 7 of 7 invariants hold`."""
    looked_at = [i for i in report.invariants if i.holds is not None]
    held = sum(bool(i.holds) for i in looked_at)
    words = "Healthy start" if report.healthy else "Not a healthy start"
    return f"{words}: {held} of {len(looked_at)} invariants hold"


def check_html(report: CheckReport) -> Markup:
    """One row an invariant; the comparison of both sides where it did not pass."""
    kind = ("✓ pass", "good") if report.healthy else ("✗ fail", "bad")
    heads = [
        Column("", "fit"),
        Column("invariant"),
        Column("value", "num"),
        Column("has to be", "fit"),
        Column("", "mid"),
    ]
    rows = _rows(report, longest_note=600)
    agrees = report.mismatch.verdict == "pass"
    return join(
        (
            title(f"{check_title(report)} ", badge(*kind)),
            table(heads, rows),
            fold("Both sides, token by token", mismatch_html(report.mismatch), is_open=not agrees),
            note(f"took {duration(report.seconds)}; the session is as it was before"),
        )
    )


def check_plain(report: CheckReport) -> str:
    """The same for a terminal."""
    rows = _rows(report, longest_note=90)
    return "\n".join((check_title(report), columns(rows)))


def _rows(report: CheckReport, longest_note: int) -> list[list[str]]:
    return [
        [
            MARKS[i.holds],
            shorten(i.name, 60),
            number(i.value),
            shorten(i.bound, 60),
            shorten(i.note, longest_note),
        ]
        for i in report.invariants
    ]
