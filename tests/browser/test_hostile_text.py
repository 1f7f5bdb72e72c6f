"""A browser shows what a model, a data set or a reward function wrote, and obeys none of it."""

from __future__ import annotations

import nbformat
import pytest

from tests.browser.conftest import OpenPage
from tests.browser.lab import Lab, Server, errors_of, shown_notebook
from tests.browser.measure import OUTPUTS, open_all, out_of_place
from tests.viz.test_hostile_text import HOSTILE, poisoned


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    """Every kind of display with every hostile text, in every place that takes text."""
    return shown_notebook([r._repr_mimebundle_() for text in HOSTILE for r in poisoned(text)])


@pytest.mark.slow
def test_jupyterlab_obeys_nothing_that_is_shown(
    lab: Lab, server: Server, notebook: nbformat.NotebookNode
) -> None:
    lab.open(server.put("hostile.ipynb", notebook), kernel=False)
    open_all(lab.page)
    assert lab.outputs().count() == len(notebook.cells)
    assert out_of_place(lab.page) == []
    assert lab.page.locator("mjx-container").count() == 0, "model text was typeset as maths"
    assert lab.page.locator(f"{OUTPUTS} :is(a, img, script, iframe, link)").count() == 0
    assert lab.watch.nothing, lab.watch


@pytest.mark.slow
def test_a_page_obeys_nothing_that_is_shown(
    notebook: nbformat.NotebookNode, open_page: OpenPage
) -> None:
    page, watch = open_page(notebook)
    open_all(page)
    assert page.locator(OUTPUTS).count() == len(notebook.cells)
    assert out_of_place(page) == []
    assert page.locator(f"{OUTPUTS} :is(a, img, script, iframe, link)").count() == 0
    assert watch.nothing, watch


@pytest.mark.slow
def test_errors_and_prints_of_a_running_kernel_are_not_obeyed(lab: Lab, server: Server) -> None:
    v4 = nbformat.v4
    head = "from kit.errors import RewardError\nfrom kit.samples import Sample"
    cells = [v4.new_code_cell(head)]
    for text in HOSTILE:
        printed = text.encode("utf-8", "replace").decode()  # kernels cannot send half a pair
        shown = v4.new_code_cell(f"print({printed!a})\nSample(response={text!a})")
        failing = v4.new_code_cell(f"raise RewardError({text!a}, fix={text!a})")
        failing.metadata["tags"] = ["raises-exception"]
        cells += [shown, failing]
    live = shown_notebook([])
    live.cells = cells
    lab.open(server.put("live.ipynb", live))
    lab.run_all(120)
    assert len(errors_of(lab.notebook())) == len(HOSTILE)
    assert lab.page.locator(".kit-viz").count() == len(HOSTILE)
    assert lab.page.locator(f"{OUTPUTS} :is(img, script, iframe, link)").count() == 0
    assert lab.watch.nothing, lab.watch
