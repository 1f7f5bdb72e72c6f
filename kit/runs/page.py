"""The executed notebook as one HTML file that needs no network."""

from __future__ import annotations

from pathlib import Path

_TEMPLATE = """\
{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block jupyter_widgets -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
"""
"""Nbconvert's JupyterLab look without the scripts that it would fetch from other hosts."""

_NEEDS_SCRIPTS = ("application/vnd.jupyter.widget-view+json", "application/javascript")
"""Kinds of output that show nothing without those scripts; their plain form is shown instead."""


def write_page(notebook: Path) -> Path:
    """Write `notebook.html` beside an executed `notebook.ipynb`."""
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    kinds = HTMLExporter().default_config["NbConvertBase"]["display_data_priority"]
    shown = [kind for kind in kinds if kind not in _NEEDS_SCRIPTS]
    exporter = HTMLExporter(
        config=Config({"NbConvertBase": {"display_data_priority": shown}}),
        raw_template=_TEMPLATE,
        embed_images=True,
    )
    executed = nbformat.read(notebook, as_version=4)
    executed.metadata.pop("widgets", None)  # the state of what cannot be shown without scripts
    html, _ = exporter.from_notebook_node(executed, {"metadata": {"name": notebook.stem}})
    target = notebook.with_suffix(".html")
    target.write_text(html, encoding="utf-8")
    return target
