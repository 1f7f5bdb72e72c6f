"""The lessons in JupyterLab, on the real stack, driven through its menus as a person would."""

from __future__ import annotations

import re

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from tests.browser.lab import Lab, Server, errors_of, shown_notebook
from tests.browser.measure import open_all, out_of_place, too_faint
from tests.cases import slow
from tests.lessons import FAST, LESSONS, NOTEBOOKS
from tests.processes import alive, assert_gone

SECONDS = 900.0
"""For a whole lesson; on an idle machine each takes about a minute."""
IN_PLACE_OF_WIDGETS = '[class*="kit-still-"]'
LASTING = f'.jp-OutputArea-output:not(:has([class*="kit-live-"])):not(:has({IN_PLACE_OF_WIDGETS}))'
"""Outputs that show the same with a kernel and without."""
START = """\
from kit import RLSession
session = RLSession.start("tiny")
stack = session.debug.stack.cluster
print("STACK", stack.directory, stack.entry.head)"""
TRAIN = """\
report = session.train(500, until=lambda step: print("finished step", step.step))
report"""
AFTER = """\
print("DONE", len(report), session.step_count, len(session.generate(["1+1="])))"""
AGAIN = """\
from kit import RLSession
how = "had" if RLSession.current() else "attached"
session = RLSession.current() or RLSession.attach()
print("AGAIN", how, session.debug.stack.cluster.directory, "at step", session.step_count)"""


@pytest.mark.parametrize("name", slow(*LESSONS))  # test_notebooks.py has them as batch runs
def test_a_lesson_runs_to_its_end_and_is_the_same_when_opened_again(
    name: str, lab: Lab, server: Server
) -> None:
    path = NOTEBOOKS / f"{name}.ipynb"
    lesson = parameterize_notebook(load_notebook_node(str(path)), FAST.get(name, {}))
    served = server.put(path.name, lesson)
    lab.open(served)
    lab.run_all(SECONDS)
    executed = lab.notebook()
    assert errors_of(executed) == []
    assert all(c.execution_count for c in executed.cells if c.cell_type == "code" and c.source)
    open_all(lab.page)
    shown = _lasting(lab)
    assert out_of_place(lab.page) == []
    assert too_faint(lab.page) == {}
    assert lab.watch.nothing, lab.watch

    lab.save_and_shut_down()
    lab.open(served, kernel=False)
    open_all(lab.page)
    assert _lasting(lab) == shown
    for picture in lab.page.locator(IN_PLACE_OF_WIDGETS).all():
        assert picture.is_visible()
    assert "Error displaying widget" not in lab.page.locator(".jp-Notebook").inner_text()
    assert lab.watch.nothing, lab.watch


@pytest.mark.slow
def test_interrupt_keeps_the_steps_restart_the_session_and_shutting_down_leaves_nothing(
    lab: Lab, server: Server
) -> None:
    lesson = shown_notebook([])
    lesson.cells = [nbformat.v4.new_code_cell(source) for source in (START, TRAIN, AFTER, AGAIN)]
    lab.open(server.put("interrupted.ipynb", lesson))

    lab.run_all()
    lab.wait_for_words(1, "finished step 2", SECONDS)
    lab.menu("Kernel", "Interrupt Kernel")
    lab.wait_until_done(SECONDS)
    _, trained, after, _ = (_words(cell) for cell in lab.notebook().cells)
    counted = re.search(r"DONE (\d+) (\d+) 8", after)
    assert counted, after
    steps, updates = map(int, counted.groups())
    assert steps == updates
    assert steps - trained.count("finished step") in (0, 1)  # it may come just before the words
    where = f"stopped early: interrupted (in step {steps}|after step {steps - 1})"
    assert re.search(where, trained), trained

    head, directory = _stack(lab)
    assert alive(head, directory)
    lab.restart_kernel()
    assert alive(head, directory)
    lab.run_cell(3)
    lab.wait_for_words(3, f"AGAIN attached {directory} at step {steps}", SECONDS)

    lab.menu("Kernel", "Shut Down Kernel")
    assert_gone(head, directory)


def _lasting(lab: Lab) -> list[str]:
    seen = lab.page.locator(LASTING).filter(visible=True)
    return [text for text in seen.all_inner_texts() if text.strip()]


def _stack(lab: Lab) -> tuple[int, str]:
    """Process id and directory of the stack that the first cell started."""
    line = next(x for x in _words(lab.notebook().cells[0]).splitlines() if x.startswith("STACK"))
    _, directory, head = line.split()
    return int(head), directory


def _words(cell: nbformat.NotebookNode) -> str:
    """What a cell shows, as text."""
    data = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in cell.outputs]
    return "\n".join(data)
