"""An executed notebook as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat

from kit.reports.runs import RunRecord
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


def record(**changed: Any) -> RunRecord:
    known = {
        "status": "completed",
        "notebook": "lessons/<b>solve.ipynb",
        "directory": "lessons",
        "parameters": {"steps": 20, "note": "</header>"},
        "given": {"note": "</header><script>{{ 7 * 7 }}"},
        "headline": {
            "steps": 20,
            "reward_first": 0.3515625,
            "reward_last": 0.9453125,
            "dataset": "addition",
            "mean_reward_before": 0.42,
            "mean_reward_after": 0.9776,
            "accuracy_before": 0.42,
            "accuracy_after": 0.9776,
        },
        "seed": 3,
        "versions": {"kit": "0.1.0", "torch": "2.11.0"},
        "git_commit": "424d9b1",
        "machine": {"host": "secret-name", "cores": 2, "memory_gib": 23.5, "gpus": []},
        "started": "2026-11-23T00:32:56+00:00",
        "seconds": 156.66,
    }
    return RunRecord.model_validate(known | changed)


def page_with(folder: Path, found: RunRecord) -> str:
    nbformat.write(nbformat.v4.new_notebook(), folder / "notebook.ipynb")
    found.write(folder)
    return write_page(folder / "notebook.ipynb").read_text("utf-8")


def test_a_runs_page_begins_with_what_came_of_it(tmp_path: Path) -> None:
    page = page_with(tmp_path, record())
    assert "<title>&lt;b&gt;solve, 23 November 2026, 00:32 UTC</title>" in page
    top = page.split("<header>")[1].split("</header>")[0]
    for words in ("✓ completed", "0.352 → 0.945", "42.0% → 97.8%", "2 min 37 s", "424d9b1"):
        assert words in top
    assert "{{ 7 * 7 }}" in top
    assert "<script" not in page
    assert "secret-name" not in page


def test_a_page_of_a_run_that_came_to_nothing_says_so(tmp_path: Path) -> None:
    page = page_with(
        tmp_path,
        record(status="failed", headline={}, given={}, seed=None, machine={}, git_commit=None),
    )
    top = page.split("<header>")[1].split("</header>")[0]
    assert "✗ failed" in top
    assert "All parameters are the notebook" in top
    assert "steps" not in top.replace(top.split("</style>")[0], "")


def test_a_page_says_which_cell_failed_and_follows_the_readers_theme(tmp_path: Path) -> None:
    v4 = nbformat.v4
    error = v4.new_output("error", ename="ValueError", evalue="<b>boom</b>", traceback=["boom"])
    cells = [v4.new_code_cell("1"), v4.new_code_cell("raise", outputs=[error])]
    nbformat.write(v4.new_notebook(cells=cells), tmp_path / "lesson.ipynb")
    page = write_page(tmp_path / "lesson.ipynb").read_text("utf-8")
    assert "Cell 2 failed: ValueError: &lt;b&gt;boom&lt;/b&gt;" in page
    assert page.index('id="failed-cell"') < page.index("raise")
    assert 'media="screen and (prefers-color-scheme: dark)"' in page
    assert "data-jp-theme-light" not in page.split("<body")[1].split(">")[0]


def test_a_page_runs_and_loads_nothing_whatever_its_cells_display(tmp_path: Path) -> None:
    v4 = nbformat.v4
    hostile = (
        "<script>document.title = 'ran'</script><img src=x onerror=\"document.title='ran'\">"
        '<META http-equiv="refresh" content="0; url=https://example.org"><b>shown</b>'
    )
    shown = v4.new_output("display_data", {"text/html": hostile, "text/plain": "plain"})
    cells = [v4.new_code_cell("1", outputs=[shown]), v4.new_markdown_cell(hostile)]
    title = {"title": "</title><script>document.title = 'ran'</script>"}
    nbformat.write(v4.new_notebook(cells=cells, metadata=title), tmp_path / "lesson.ipynb")
    page = write_page(tmp_path / "lesson.ipynb").read_text("utf-8")
    first = page.split("<head>")[1].lstrip()
    assert first.startswith('<meta http-equiv="Content-Security-Policy" content="default-src')
    assert "script-src" not in first.split(">")[0], "default-src forbids them all"
    assert "<b>shown</b>" in page
    assert "<meta" not in page.split("<body")[1].lower()
    assert "<script" not in page.split("</title>")[0]
