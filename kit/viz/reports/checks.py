"""`CheckReport`, the invariants of a healthy start, and `Diagnosis`, what this machine lacks.

Both are lists of checks: each has a sign, what was found, and what it should be or how to mend it.
"""

from __future__ import annotations

import textwrap

from markupsafe import Markup

from kit.reports import CheckReport
from kit.reports.diagnostics import Diagnosis, Finding
from kit.utils.formatting import columns, count, duration, number, shorten
from kit.viz.html import Child, Column, badge, fold, join, note, table, tag, title
from kit.viz.render import register
from kit.viz.reports.mismatch import mismatch_html

MARKS = {True: "✓", False: "✗", None: "–"}


def _check_title(report: CheckReport) -> str:
    """`Healthy start: 7 of 7 invariants hold`."""
    looked_at = [i for i in report.invariants if i.holds is not None]
    held = sum(bool(i.holds) for i in looked_at)
    words = "Healthy start" if report.healthy else "Not a healthy start"
    return f"{words}: {held} of {len(looked_at)} invariants hold"


def _check_html(report: CheckReport) -> Markup:
    """One row an invariant; the comparison of both sides where it did not pass."""
    kind = ("✓ pass", "good") if report.healthy else ("✗ fail", "bad")
    heads = [Column("", "fit"), Column("invariant"), Column("value", "num")]
    heads += [Column("has to be", "fit"), Column("", "hint")]
    agrees = report.mismatch.verdict == "pass"
    return join(
        title(f"{_check_title(report)} ", badge(*kind)),
        table(heads, _rows(report, longest_note=600)),
        fold("Both sides, token by token", mismatch_html(report.mismatch), is_open=not agrees),
        note(f"took {duration(report.seconds)}; the session is as it was before"),
    )


def _check_plain(report: CheckReport) -> str:
    return f"{_check_title(report)}\n{columns(_rows(report, longest_note=90))}"


register(CheckReport, _check_html, _check_plain)


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


LEVELS = {"ok": ("✓ ok", "good"), "note": ("! note", "warn"), "problem": ("✗ problem", "bad")}
WIDTH = 100
LONGEST = 1_000
"""Characters of one text; only an error that quotes somebody's data could have more."""


def _diagnosis_title(report: Diagnosis) -> str:
    """`qwen3-0.6b (Qwen/Qwen3-0.6B) cannot start here yet: 2 problems, 1 note`."""
    notes = sum(finding.level == "note" for finding in report.findings)
    words = [count(len(report.problems), "problem")] if report.problems else []
    words += [count(notes, "note")] if notes else []
    name = shorten(report.name, 60)
    if report.model != report.name:
        name += f" ({shorten(report.model, 60)})"
    verdict = "can start here" if report.ready else "cannot start here yet"
    return f"{name} {verdict}: {', '.join(words) or 'everything is in order'}"


def _diagnosis_html(report: Diagnosis) -> Markup:
    """One row a check."""
    heads = [Column("", "fit"), Column("looked at", "fit"), Column("found", "hint")]
    rows: list[list[Child]] = [
        [badge(*LEVELS[each.level]), shorten(each.name, 40), _found(each)]
        for each in report.findings
    ]
    kind = ("✓ ready", "good") if report.ready else ("✗ not ready", "bad")
    return join(
        title(f"{_diagnosis_title(report)} ", badge(*kind)),
        table(heads, rows),
        note(f"took {duration(report.seconds)}; nothing was started or changed"),
    )


def _found(finding: Finding) -> Markup:
    return join(
        tag("div", _text(finding.found)),
        tag("div", tag("b", "What to do: "), _text(finding.fix)) if finding.fix else None,
        *(tag("pre", _text(line), class_="kv-text") for line in finding.commands),
    )


def _diagnosis_plain(report: Diagnosis) -> str:
    """Text for a terminal; commands stand whole on lines of their own."""
    heads = [(LEVELS[each.level][0], shorten(each.name, 40)) for each in report.findings]
    signs, names = (max(map(len, column), default=0) for column in (*zip(*heads, strict=True),))
    lines = [_diagnosis_title(report), ""]
    for (sign, name), each in zip(heads, report.findings, strict=True):
        head = f"{sign.ljust(signs)}  {name.ljust(names)}  "
        indent = " " * len(head)
        lines += _wrap(_text(each.found), head, indent)
        if each.fix:
            lines += _wrap(f"What to do: {_text(each.fix)}", indent, indent)
        lines += [f"{indent}  $ {_text(command)}" for command in each.commands]
    return "\n".join(lines)


register(Diagnosis, _diagnosis_html, _diagnosis_plain)


def _text(words: str) -> str:
    return shorten(words.replace("\n", " "), LONGEST)


def _wrap(text: str, first: str, rest: str) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=first,
        subsequent_indent=rest,
        break_long_words=False,
        break_on_hyphens=False,
    )
