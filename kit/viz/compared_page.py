"""A comparison as one HTML file, which needs neither scripts nor a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from markupsafe import Markup

from kit.viz.compared_runs import comparison_html
from kit.viz.html import page, tag
from kit.viz.text import count
from kit.viz.theme import DARK, LIGHT

if TYPE_CHECKING:
    from kit.runs.compare import RunComparison

_NOTHING_ELSE = "default-src 'none'; style-src 'unsafe-inline'"
"""What a browser is told besides: load nothing, run nothing."""


def comparison_page(compared: RunComparison) -> str:
    """The whole document; light or dark as the reader's system is, light when printed."""
    runs = count(len(compared.runs), "run")
    names = ", ".join(sorted({run.notebook for run in compared.runs}))
    around = (
        f"body{{margin:0;background:{LIGHT['bg']}}}main{{max-width:1140px;margin:0 auto;"
        f"padding:12px}}@media screen and (prefers-color-scheme:dark){{"
        f"body{{background:{DARK['bg']}}}}}"
        "main .kit-viz.kit-viz{max-width:none}"
        "@media print{main .kit-viz.kit-viz .kv-wide{overflow:visible}}"
    )
    head = tag(
        "head",
        Markup('<meta charset="utf-8">'),
        Markup('<meta name="viewport" content="width=device-width, initial-scale=1">'),
        Markup('<meta name="color-scheme" content="light dark">'),
        Markup(f'<meta http-equiv="Content-Security-Policy" content="{_NOTHING_ELSE}">'),
        tag("title", f"{runs} side by side: {names}"),
        Markup(f"<style>{around}</style>"),
    )
    body = tag("body", tag("main", Markup(page(comparison_html(compared)))))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"
