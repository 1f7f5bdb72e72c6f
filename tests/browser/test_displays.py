"""Every display as a browser shows it: legible, in its place, without scripts, by keyboard too."""

from __future__ import annotations

import nbformat
import pytest
from playwright.sync_api import Page

from tests.browser.conftest import OpenPage
from tests.browser.displays import DISPLAYS, bundle
from tests.browser.lab import Lab, Server, shown_notebook
from tests.browser.measure import crowded, open_all, out_of_place, too_faint
from tests.cases import slow

FOCUS = """() => {
    const now = document.activeElement, style = getComputedStyle(now);
    return [now.nodeName, now.textContent.trim(), parseFloat(style.outlineWidth) || 0,
            style.outlineStyle];
}"""


@pytest.fixture(scope="module")
def notebook() -> nbformat.NotebookNode:
    return shown_notebook([bundle(name) for name in DISPLAYS])


@pytest.fixture(scope="module")
def saved(server: Server, notebook: nbformat.NotebookNode) -> str:
    return server.put("displays.ipynb", notebook)


@pytest.mark.parametrize("theme", ["Light", *slow("Dark")])
def test_a_saved_notebook_shows_every_display_without_a_kernel(
    theme: str, lab: Lab, saved: str
) -> None:
    lab.open(saved, theme=theme, kernel=False)
    assert lab.page.evaluate("panel.sessionContext.session") is None
    assert lab.outputs().count() == len(DISPLAYS)
    open_all(lab.page)
    assert out_of_place(lab.page) == []
    assert too_faint(lab.page) == {}
    assert lab.watch.nothing, lab.watch


@pytest.mark.slow
def test_a_narrow_window_breaks_no_display(lab: Lab, saved: str) -> None:
    lab.open(saved, kernel=False)
    lab.page.set_viewport_size({"width": 700, "height": 900})
    try:
        open_all(lab.page)
        assert out_of_place(lab.page) == []
        assert crowded(lab.page) == []
    finally:
        lab.page.set_viewport_size({"width": 1280, "height": 900})


@pytest.mark.slow
def test_beside_other_notebooks_every_display_can_be_read(
    notebook: nbformat.NotebookNode, open_page: OpenPage
) -> None:
    """Panes of two or three columns, with a notebook's own margin in them."""
    page, _ = open_page(notebook)
    open_all(page)
    for width in (1280, 480, 400, 320):
        page.set_viewport_size({"width": width, "height": 900})
        assert (width, out_of_place(page)) == (width, [])
        assert (width, crowded(page)) == (width, [])


@pytest.mark.slow
def test_a_page_of_the_notebook_shows_the_same_without_scripts(
    notebook: nbformat.NotebookNode, open_page: OpenPage
) -> None:
    words = []
    for scripts in (True, False):
        page, watch = open_page(notebook, scripts=scripts)
        open_all(page)
        assert out_of_place(page) == []
        assert too_faint(page) == {}
        assert watch.nothing, watch
        words.append(page.locator(".jp-OutputArea-output").all_inner_texts())
        drawings = page.locator(".kv-drawing svg")
        assert drawings.count()
        assert all(box and box["height"] > 50 for box in map(_box, drawings.all()))
    assert words[0] == words[1]
    assert len(words[0]) == len(DISPLAYS)


def _box(place: object) -> object:
    return place.bounding_box()  # type: ignore[attr-defined]


def test_a_notebook_that_is_not_trusted_keeps_the_words_apart_and_drops_drawings(
    lab: Lab, server: Server
) -> None:
    untrusted = shown_notebook([bundle("curves"), bundle("rollout")])
    lab.open(server.put("untrusted.ipynb", untrusted, trusted=False), kernel=False)
    curves, rollout = lab.outputs().all_inner_texts()
    assert "trust the notebook to see this drawn" in curves
    assert "each step" not in curves, "the letters of a drawing are shown without the drawing"
    assert "0.45 mean reward" in rollout
    assert lab.watch.nothing, lab.watch


@pytest.mark.slow
def test_every_fold_is_reached_and_opened_by_keyboard(lab: Lab, saved: str) -> None:
    lab.open(saved, kernel=False)
    for output in lab.page.locator(".kit-viz").all():
        output.click(position={"x": 2, "y": 2})
        _walk(lab.page, output.locator("summary").count())
        assert output.locator("details:not([open])").count() == 0


def _walk(page: Page, folds: int) -> None:
    """Tab from fold to fold and open each. JupyterLab's own buttons on a cell come first."""
    for fold in range(folds):
        for _ in range(1 if fold else 20):
            page.keyboard.press("Tab")
            name, words, width, style = page.evaluate(FOCUS)
            if name == "SUMMARY":
                break
        assert name == "SUMMARY", f"Tab went to {name} {words[:60]!r}"
        assert (width >= 2, style) == (True, "solid"), f"one does not see that {words!r} has focus"
        if not page.evaluate("document.activeElement.parentElement.open"):
            page.keyboard.press("Enter")
