"""An executed notebook as a page."""

from __future__ import annotations

from pathlib import Path

import nbformat

from kit.runs.page import write_page


def test_a_page_keeps_nothing_of_widgets_but_what_shows_without_scripts(tmp_path: Path) -> None:
    v4 = nbformat.v4
    view = {"model_id": "a1", "version_major": 2, "version_minor": 0}
    data = {"application/vnd.jupyter.widget-view+json": view, "text/plain": "a slider at 3"}
    cell = v4.new_code_cell("slider", outputs=[v4.new_output("display_data", data)])
    states = {"a1": {"model_name": "IntSliderModel", "model_module": "x", "state": {"value": 3}}}
    state = {"state": states, "version_major": 2, "version_minor": 0}
    widgets = {"application/vnd.jupyter.widget-state+json": state}
    notebook = v4.new_notebook(cells=[cell], metadata={"widgets": widgets})
    nbformat.write(notebook, tmp_path / "lesson.ipynb")
    page = write_page(tmp_path / "lesson.ipynb").read_text("utf-8")
    assert "a slider at 3" in page
    assert "<title>lesson</title>" in page
    assert "<script" not in page
