"""What is shown of a kernel that is gone says so, and how to go on; and that is how one goes on."""

from __future__ import annotations

import re

import nbformat
import pytest
from playwright.sync_api import expect

from tests.browser.lab import Lab, Server, errors_of, shown_notebook
from tests.browser.measure import out_of_place, too_faint

SECONDS = 600.0
START = """\
from kit import RLSession
session = RLSession.start("tiny")
print("STARTED")"""
TRAIN = """\
training = session.train(5000, dashboard=True)"""
BROWSE = """\
from tests.viz.results import make_rollout
make_rollout(groups=2).browse()"""
ATTACH = """\
from kit import RLSession; session = RLSession.attach()
print("ATTACHED at step", session.step_count)
session.dashboard()"""
LINE = """\
session.train(5000)"""
CLOSE = """\
from kit import RLSession; session = RLSession.attach()
print("CLOSED at step", session.step_count)
session.close()"""
OLD = {
    1: ("Picture of the training, taken at", "session = RLSession.attach()"),
    2: ("Picture of the sample browser, taken at", "run the cell again"),
}
"""By cell: what its display says once its kernel is gone."""
SILENT = "document.getAnimations().forEach(each => each.finish())"
"""A minute without news, at once."""


def shown(lab: Lab, place: int) -> str:
    """What one sees below a cell."""
    cell = lab.page.locator(".jp-Notebook .jp-Cell").nth(place)
    return cell.locator(".jp-Cell-outputWrapper").inner_text()


def assert_old(lab: Lab) -> None:
    """The displays of the first kernel say that they are pictures, and nothing looks alive."""
    for place, words in OLD.items():
        seen = shown(lab, place)
        assert all(each in seen for each in words), seen
        assert "Error displaying widget" not in seen
    assert lab.page.locator('[class*="kit-live-"]').filter(visible=True).count() == 0
    assert lab.page.locator(".jupyter-widgets-disconnected").filter(visible=True).count() == 0
    assert out_of_place(lab.page) == []
    assert too_faint(lab.page) == {}


@pytest.mark.slow
def test_displays_of_a_kernel_that_is_gone_say_so_and_how_to_go_on(
    lab: Lab, server: Server
) -> None:
    notebook = shown_notebook([])
    cells = (START, TRAIN, BROWSE, ATTACH, LINE, CLOSE)
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    served = server.put("old.ipynb", notebook)
    lab.open(served)
    for place, words in enumerate(("STARTED", "1 of 5,000 steps", "Sample 0 of prompt 0")):
        lab.run_cell(place)
        output = lab.page.locator(".jp-Notebook .jp-Cell").nth(place)
        expect(output).to_contain_text(re.compile(words), timeout=1000 * SECONDS)
    assert "Picture of" not in shown(lab, 1) + shown(lab, 2)  # the widgets are there
    lab.page.evaluate("panel.context.save()")  # as it is done every two minutes

    lab.restart_kernel()
    assert_old(lab)
    lab.open(served, theme="Dark", kernel=False)  # as it was saved while all was alive
    assert_old(lab)

    lab.open(served)
    lab.run_cell(3)
    lab.wait_for_words(3, "ATTACHED at step", SECONDS)
    expect(lab.page.locator('[class*="kit-live-"]').first).to_contain_text("steps")
    lab.run_cell(4)
    # Which of the steps one sees depends on how fast they pass.
    line = lab.page.locator(".jp-Notebook .jp-Cell").nth(4)
    expect(line).to_contain_text(re.compile(r"step \d+/5000"), timeout=1000 * SECONDS)
    assert not re.search("No news since|<div|<progress", shown(lab, 4))
    lab.restart_kernel()
    lab.page.evaluate(SILENT)
    assert "No news since" in shown(lab, 4)
    assert "session = RLSession.attach()" in shown(lab, 4)
    lab.run_cell(5)
    lab.wait_for_words(5, "CLOSED at step", SECONDS)
    assert errors_of(lab.notebook()) == []
