"""A lesson that was interrupted and is run again from the top tells the same story."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from threading import Timer
from typing import Any

import nbformat
import pytest
from jupyter_client.blocking import BlockingKernelClient
from jupyter_client.manager import KernelManager

from tests.cases import slow
from tests.lessons import NOTEBOOKS
from tests.processes import leave_only

ROOT = Path(__file__).parent.parent
STORIES = {
    "04_samples_and_rewards": (
        "steps = 3",
        "cell-18",
        "gamed.to_json(), mended.to_json(), before.accuracy, hacked.accuracy, after.accuracy",
    ),
    "05_estimators": (
        "steps, contenders = 2, ['rloo', 'ppo']",
        "cell-18",
        "table.tolist(), curves",
    ),
    "07_what_if": (
        "rates = [1e-5, 3e-4]",
        "cell-18",
        "results.to_json(), before.accuracy, stepped.accuracy, same, session.step_count",
    ),
}
"""Of a lesson: other values for it, the cell that is interrupted, and what came out of it."""


@pytest.fixture
def kernel() -> Iterator[KernelManager]:
    """A kernel in which a person works, in the folder of the lessons."""
    leave_only(None)
    manager = KernelManager(shutdown_wait_time=120.0)
    manager.start_kernel(cwd=str(NOTEBOOKS), env=os.environ | {"PYTHONPATH": str(ROOT)})
    yield manager
    manager.shutdown_kernel()


@pytest.mark.parametrize("lesson", slow(*STORIES))
def test_a_lesson_that_was_interrupted_tells_the_same_story_from_the_top(
    kernel: KernelManager, lesson: str
) -> None:
    values, long_cell, outcome = STORIES[lesson]
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        run_all(client, lesson, values)
        told = shown(client, outcome)
        for seconds in (3.0, 1.5, 0.7, 0.3):  # a quick machine is through before that
            run_all(client, lesson, values, before=long_cell)
            press = Timer(seconds, kernel.interrupt_kernel)
            press.start()
            error = say(client, code_of(lesson, long_cell))
            press.cancel()
            if error:
                break
        assert error.startswith("KeyboardInterrupt")
        run_all(client, lesson, values)
        assert shown(client, outcome) == told
    finally:
        client.stop_channels()


def run_all(client: BlockingKernelClient, lesson: str, values: str, before: str = "") -> None:
    """Run a lesson from the top, up to a cell, or to its exercises."""
    for cell in nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4).cells:
        tags = cell.metadata.get("tags", [])
        if cell.id == before or any(tag.startswith("exercise") for tag in tags):
            return
        if cell.cell_type == "code":
            error = say(client, cell.source)
            assert not error, (cell.id, error)
            if "parameters" in tags:
                say(client, values)


def code_of(lesson: str, name: str) -> str:
    """The code of a cell."""
    cells = nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4).cells
    (source,) = [cell.source for cell in cells if cell.id == name]
    return str(source)


def say(client: BlockingKernelClient, code: str) -> str:
    """Run a cell; the error that it ended with, if any."""
    reply = client.execute_interactive(code, output_hook=lambda _: None, timeout=300)["content"]
    return "" if reply["status"] == "ok" else f"{reply['ename']}: {reply['evalue']}"


def shown(client: BlockingKernelClient, expression: str) -> str:
    """What the kernel shows of an expression."""
    texts: list[str] = []

    def hear(message: dict[str, Any]) -> None:
        if message["msg_type"] == "execute_result":
            texts.append(message["content"]["data"]["text/plain"])

    reply = client.execute_interactive(expression, output_hook=hear, timeout=60)["content"]
    assert reply["status"] == "ok", reply
    return "".join(texts)
