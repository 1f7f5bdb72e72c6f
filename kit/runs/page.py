"""The executed notebook as one HTML file that needs no network, in the reader's own theme."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import RunError
from kit.runs.parameters import read_notebook
from kit.viz.html import tag

if TYPE_CHECKING:
    from nbformat import NotebookNode


_TEMPLATE = """\
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block notebook_css -%}
{{ super() }}
{{ resources.include_css("static/theme-dark.css") | replace("<style", DARK) }}
<style>STYLE</style>
{%- endblock -%}
{%- block body_header -%}
<body class="jp-Notebook"><main>
{%- if resources.kit_summary -%}<header>{{ resources.kit_summary }}</header>{%- endif -%}
{%- endblock -%}
"""
"""Nbconvert's JupyterLab look without the scripts that it would fetch from other hosts. It has a
light theme or a dark one; here the dark one is laid over the light one where the reader's system
asks for it, and the displays follow, since the page says no theme of its own. Plots are drawn on
white: there they are turned into light lines on the page's own ground, with their hues kept."""

_DARK = """'<style media="screen and (prefers-color-scheme: dark)"'"""
_STYLE = """
:root{color-scheme:light dark}
body{background:var(--jp-layout-color0);color:var(--jp-content-font-color1)}
main{max-width:1180px;margin:0 auto}
header{margin:0 0 12px 64px;padding:12px;border-bottom:1px solid var(--jp-border-color1)}
.kit-failed{border:2px solid #c2410c;border-left-width:10px;padding:8px 12px;margin:0;
 background:#fff4ed;color:#7c2d12;font-weight:600;overflow-wrap:anywhere}
p.kit-failed a{color:inherit}
.jp-InputPrompt,.jp-OutputPrompt{opacity:1!important;color:var(--jp-content-font-color2)}
.celltag_kit-failed{border-left:4px solid #c2410c}
@media screen and (prefers-color-scheme:dark){
 .jp-RenderedImage img{filter:invert(1) hue-rotate(180deg);mix-blend-mode:screen}
 :root{--jp-mirror-editor-comment-color:#8fb8b8}
 .kit-failed{background:#2d1608;color:#ffd9c2;border-color:#f0803c}
 .celltag_kit-failed{border-color:#f0803c}}
"""
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "style-src 'unsafe-inline'; img-src data:; media-src data:; font-src data:; "
    "base-uri 'none'; form-action 'none'\">"
)
"""What a browser is told: run nothing, load nothing. Cells can display any HTML, and the page shows
it without scripts; pictures are in the page itself."""
_META = re.compile(r"<meta\b", re.IGNORECASE)
"""Would send a reader elsewhere, which no policy prevents."""
_NEEDS_SCRIPTS = ("application/vnd.jupyter.widget-view+json", "application/javascript")
"""Kinds of output that show nothing without those scripts; their plain form is shown instead."""
_MARKER = "papermill-error-cell-tag"
_FAILED = "kit-failed"
_ANCHOR = "failed-cell"


def write_page(notebook: Path) -> Path:
    """Write `notebook.html` beside an executed `notebook.ipynb`.

    Where the run's record lies beside it too, the page begins with what came of the run.
    """
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    from kit.utils.files import replace_file

    kinds = HTMLExporter().default_config["NbConvertBase"]["display_data_priority"]
    shown = [kind for kind in kinds if kind not in _NEEDS_SCRIPTS]
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": shown}}),
        raw_template=_TEMPLATE.replace("DARK", _DARK).replace("STYLE", _STYLE),
        embed_images=True,
    )
    executed = read_notebook(notebook)
    executed.metadata.pop("widgets", None)  # the state of what cannot be shown without scripts
    _mark_failure(executed)
    html, _ = exporter.from_notebook_node(executed, _resources(notebook))
    return replace_file(notebook.with_suffix(".html"), _guarded(html))


def _guarded(html: str) -> str:
    """The page with its policy before anything else, and no other such words from its cells."""
    head, body_begins, body = html.partition("<body")
    head = head.replace("<head>", f"<head>\n{POLICY}", 1)
    return head + body_begins + _META.sub("&lt;meta", body)


def _resources(notebook: Path) -> dict[str, Any]:
    from kit.reports.runs import read_record
    from kit.viz.reports.runs import run_summary, run_title

    try:
        record = read_record(notebook.parent)
    except RunError:
        return {"metadata": {"name": notebook.stem}}
    return {"metadata": {"name": run_title(record)}, "kit_summary": run_summary(record)}


def _mark_failure(notebook: NotebookNode) -> None:
    """Mark a failure at the top of the page and at the cell, in place of Papermill's own marks."""
    from nbformat.v4 import new_markdown_cell

    cells = [c for c in notebook.cells if _MARKER not in c.metadata.get("tags", [])]
    notebook.cells = cells
    at = next((i for i, cell in enumerate(cells) if cell.cell_type == "code" and _why(cell)), None)
    if at is None:
        return
    number = sum(cell.cell_type == "code" for cell in cells[: at + 1])
    cells[at].metadata.tags = [*cells[at].metadata.get("tags", []), _FAILED]
    link = tag("a", "Go to it.", href=f"#{_ANCHOR}")
    top = tag("p", f"✗ Cell {number} failed: {_why(cells[at])} ", link, class_=_FAILED)
    here = tag("p", "✗ The cell below failed.", class_=_FAILED, id=_ANCHOR)
    cells.insert(at, new_markdown_cell(str(here)))
    cells.insert(0, new_markdown_cell(str(top)))


def _why(cell: NotebookNode) -> str:
    """The reason that a code cell failed; empty where it did not."""
    for output in cell.outputs:
        if output.output_type == "error":
            return " ".join(f"{output.ename}: {output.evalue}".split())[:500]
    status = cell.metadata.get("papermill", {}).get("status")
    return "it did not come to its end." if status in ("failed", "running") else ""
