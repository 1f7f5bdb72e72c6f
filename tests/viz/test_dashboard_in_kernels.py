"""What a start and a dashboard leave in a notebook: with a person at it, and in a batch run."""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from jupyter_client import BlockingKernelClient, KernelManager
from nbformat.v4 import new_code_cell, new_notebook
from rich.console import Console

from kit.runs import run_notebook

ROOT = Path(__file__).parents[2]
PATIENCE = 120.0
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BlockingKernelClient]:
    manager = KernelManager()
    manager.start_kernel(cwd=str(ROOT))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=PATIENCE)
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(kernel: BlockingKernelClient, code: str, until: Any, stdin: bool = True) -> list[Any]:
    """Run a cell as a front-end does that can (or cannot) ask a person; its messages, until."""
    request = kernel.execute(code, allow_stdin=stdin)
    messages: list[Any] = []
    deadline = time.monotonic() + PATIENCE
    while not (messages and until(messages)):
        assert time.monotonic() < deadline, messages
        message = kernel.get_iopub_msg(timeout=PATIENCE)
        assert message["msg_type"] != "error", message["content"]
        if message["parent_header"].get("msg_id") == request:
            messages.append(message)
    return messages


def idle(messages: list[Any]) -> bool:
    return messages[-1]["content"].get("execution_state") == "idle"


@pytest.mark.parametrize(("stdin", "name"), [(True, "live"), (False, "headless")])
def test_a_kernel_knows_whether_somebody_looks(
    kernel: BlockingKernelClient, stdin: bool, name: str
) -> None:
    code = "from kit.viz.live.frontend import frontend\nprint(frontend())"
    messages = execute(kernel, code, idle, stdin)
    printed = [m["content"]["text"] for m in messages if m["msg_type"] == "stream"]
    assert "".join(printed).strip() == name


START = """
import threading
from kit.viz.live import progress
progress.PATIENCE = 0.0
with progress.Starting(dict, lambda: False) as starting:
    for _ in range(300 if starting._watched else 1):
        if not starting.line:
            threading.Event().wait(0.1)
    {then}
"""


@pytest.mark.parametrize(
    ("then", "stays"), [("pass", "Started in "), ("raise SystemExit", "")], ids=["done", "failed"]
)
def test_of_a_start_one_line_stays_or_none_where_it_failed(
    kernel: BlockingKernelClient, then: str, stays: str
) -> None:
    code = START.format(then=then)
    guarded = "try:\n" + code.replace("\n", "\n    ") + "\nexcept SystemExit:\n    pass"
    messages = execute(kernel, guarded, idle)
    shown = [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"]
    updates = [m["content"]["data"] for m in messages if m["msg_type"] == "update_display_data"]
    (first,) = [data["text/plain"] for data in shown]
    assert re.fullmatch(r"starting \d+ s · Ray", first)
    assert "No news since" in shown[0]["text/html"]
    assert "No news since" not in updates[-1]["text/html"]
    assert updates[-1]["text/plain"].startswith(stays)
    assert bool(updates[-1]["text/html"]) == bool(stays)


def test_a_start_in_a_batch_run_shows_nothing(kernel: BlockingKernelClient) -> None:
    messages = execute(kernel, START.format(then="pass"), idle, stdin=False)
    assert {m["msg_type"] for m in messages} <= {"status", "execute_input"}


def test_the_widgets_give_way_to_the_picture_at_the_end(kernel: BlockingKernelClient) -> None:
    code = """
    from kit.lifecycle.train_loop import Training, show
    from tests.viz.test_dashboard import Steps
    steps = Steps()
    training = Training(steps, steps.step, 2)
    show(training)
    show(training)  # as a cell does that ends in it: nothing is shown twice
    training.resume()
    steps.may.release(2)
    report = training.wait()
    """
    code = "\n".join(line.strip() for line in code.splitlines())

    def ended(messages: list[Any]) -> bool:
        last = messages[-1]
        return last["msg_type"] == "update_display_data" and not last["content"]["data"].get(
            "text/html"
        )

    messages = execute(kernel, code, ended)
    shown = [m["content"]["data"] for m in messages if m["msg_type"] == "display_data"]
    assert [WIDGET in data for data in shown] == [True, False]
    assert shown[0]["text/html"] == ""
    assert "Picture of the training, taken at " in shown[1]["text/html"]
    assert "session.dashboard()" in shown[1]["text/html"]
    updates = [m["content"]["data"] for m in messages if m["msg_type"] == "update_display_data"]
    assert "Finished" in updates[-2]["text/html"]
    assert "Picture of the training" not in updates[-2]["text/html"]
    assert WIDGET not in updates[-1]


@pytest.mark.parametrize("then", ["pass", "raise KeyboardInterrupt"])
def test_a_line_of_progress_says_how_to_go_on_until_its_training_ends(
    kernel: BlockingKernelClient, then: str
) -> None:
    code = f"""
from kit.viz.live.progress import Progress
from tests.viz.results import make_step
try:
    with Progress(3) as progress:
        progress.update(make_step(0))
        {then}
except KeyboardInterrupt:
    pass
"""
    messages = execute(kernel, code, idle)
    drawn = [m["content"]["data"] for m in messages if m["msg_type"].endswith("display_data")]
    assert all("RLSession.attach()" in data["text/html"] for data in drawn[:-1])
    assert all("<progress " in data["text/html"] for data in drawn)
    assert "No news" not in drawn[-1]["text/html"]
    assert len(drawn) > 1


@pytest.mark.slow
def test_a_batch_run_leaves_a_picture_of_the_finished_training(tmp_path: Path) -> None:
    cells = [
        "from kit import RLSession",
        "session = RLSession.start('tiny')",
        "training = session.train(2, dashboard=True)\ntraining",
        "print(training.state, session.step_count)",
        "len(training.wait())",
        "session.close()",
    ]
    source = tmp_path / "lesson.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(cell) for cell in cells]), source)
    result = run_notebook(source, out_root=tmp_path / "runs", console=Console(file=io.StringIO()))
    assert result.error is None, result.error.traceback
    done = nbformat.read(result.notebook, as_version=4).cells
    (picture,) = done[2].outputs
    assert set(picture.data) == {"text/html", "text/plain"}
    assert "Finished" in picture.data["text/html"]
    assert "2 of 2 steps" in picture.data["text/plain"]
    assert done[3].outputs[0].text.strip() == "finished 2"
    assert done[4].outputs[0].data["text/plain"] == "2"
    assert "2 of 2 steps" in (result.folder / "notebook.html").read_text()
