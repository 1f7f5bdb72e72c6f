"""What a person clicks: a dashboard while training runs, and samples one at a time."""

from __future__ import annotations

import re

import nbformat
import pytest
from playwright.sync_api import Locator, expect

from tests.browser.lab import Lab, Server, errors_of, shown_notebook
from tests.viz.test_hostile_text import HOSTILE

SECONDS = 300.0
STEPS = 2_000
"""More than anybody waits for."""
START = """\
from kit import RLSession
session = RLSession.start("tiny")
print("STARTED")"""
TRAIN = f"""\
training = session.train({STEPS}, dashboard=True)
print("AT ONCE", training.state)"""
REFUSED = """\
try:
    session.generate(["1+1="])
except Exception as error:
    print("REFUSED", error)"""
GENERATE = """\
print("GENERATED", len(session.generate(["1+1="], n_samples_per_prompt=2)))"""
REPORT = """\
report = training.wait()
print("REPORT", len(report), len(report) == session.step_count, session.check_mismatch().verdict)
session.close()"""
BROWSE = """\
from tests.viz.results import make_rollout
browser = make_rollout(groups=4).browse()
browser"""
MARKS = """\
print("MARKED", [(m.index, m.label, m.note) for m in browser.marks])"""


def put(server: Server, name: str, *cells: str) -> str:
    notebook = shown_notebook([])
    notebook.cells = [nbformat.v4.new_code_cell(source) for source in cells]
    return server.put(name, notebook)


def button(lab: Lab, words: str) -> Locator:
    return lab.page.locator(".jp-OutputArea .widget-button", has_text=words)


def widgets(lab: Lab) -> Locator:
    """The widgets of a cell; there are only one cell's."""
    return lab.page.locator('[class*="kit-live-"]')


def steps_done(lab: Lab) -> int:
    words = widgets(lab).inner_text()
    found = re.search(rf"([\d,]+) of {STEPS:,} steps", words)
    assert found, words
    return int(found[1].replace(",", ""))


@pytest.mark.slow
def test_the_buttons_of_the_dashboard_work_while_training_runs(lab: Lab, server: Server) -> None:
    lab.open(put(server, "dashboard.ipynb", START, TRAIN, REFUSED, GENERATE, REPORT))
    lab.run_cell(0)
    lab.wait_for_words(0, "STARTED", SECONDS)
    lab.run_cell(1)
    lab.wait_for_words(1, "AT ONCE running", SECONDS)
    lab.run_cell(2)  # the kernel is free
    lab.wait_for_words(2, "REFUSED", SECONDS)
    assert "pause" in str(lab.notebook().cells[2].outputs)

    button(lab, "Pause").click()
    expect(widgets(lab)).to_contain_text("Paused", timeout=60_000)
    held = steps_done(lab)
    assert 0 < held < STEPS
    lab.run_cell(3)
    lab.wait_for_words(3, "GENERATED 2", SECONDS)
    assert steps_done(lab) == held

    button(lab, "Step").click()
    expect(widgets(lab)).to_contain_text(f"{held + 1:,} of {STEPS:,} steps", timeout=60_000)
    expect(widgets(lab)).to_contain_text("Paused", timeout=60_000)

    button(lab, "Resume").click()
    expect(widgets(lab)).not_to_contain_text(f"{held + 1:,} of", timeout=60_000)
    button(lab, "Stop").click()
    expect(lab.page.locator('[class*="kit-still-"]').first).to_contain_text("Stopped")
    expect(button(lab, "Stop")).to_have_count(0)  # the picture has taken their place
    lab.run_cell(4)
    lab.wait_for_words(4, "REPORT", SECONDS)
    assert "True pass" in str(lab.notebook().cells[4].outputs)
    assert errors_of(lab.notebook()) == []
    assert lab.watch.nothing, lab.watch


def test_the_sample_browser_filters_steps_and_keeps_marks_by_keyboard(
    lab: Lab, server: Server
) -> None:
    lab.open(put(server, "browse.ipynb", BROWSE, MARKS))
    lab.run_cell(0)
    expect(widgets(lab)).to_contain_text("Sample 0 of prompt 0", timeout=SECONDS * 1000)
    line = widgets(lab).get_by_label("Line")
    line.focus()
    lab.page.keyboard.press("ArrowUp")
    lab.page.keyboard.press("Enter")
    expect(widgets(lab)).to_contain_text("Sample 2 of prompt 0")  # 1 wrote what 0 did
    next_group = button(lab, "Next group")
    next_group.focus()
    lab.page.keyboard.press("Space")
    expect(widgets(lab)).to_contain_text("Sample 8 of prompt 1")

    first = widgets(lab).get_by_label("Reward to")
    first.fill("0")
    lab.page.keyboard.press("Enter")
    expect(widgets(lab)).not_to_contain_text("of prompt 1")  # the group that is all right
    note = widgets(lab).get_by_label("Note")
    note.fill("carried wrongly")
    lab.page.keyboard.press("Enter")
    lab.run_cell(1)
    lab.wait_for_words(1, "carried wrongly", 60)
    assert errors_of(lab.notebook()) == []
    assert lab.watch.nothing, lab.watch


@pytest.mark.slow
def test_no_text_gets_out_of_the_sample_browser(lab: Lab, server: Server) -> None:
    hostile = """\
from dataclasses import replace
from tests.viz.results import make_rollout
from tests.viz.test_hostile_text import HOSTILE
samples = [replace(s, index=i, prompt=text, response=text, label=text, error=text)
           for i, (s, text) in enumerate(zip(make_rollout(), HOSTILE))]
make_rollout().with_samples(samples).browse()"""
    lab.open(put(server, "hostile.ipynb", hostile))
    lab.run_cell(0)
    for number in range(len(HOSTILE)):
        expect(widgets(lab)).to_contain_text(f"Sample {number} of prompt", timeout=120_000)
        button(lab, "Next sample").click()
    assert errors_of(lab.notebook()) == []
    assert lab.watch.nothing, lab.watch
