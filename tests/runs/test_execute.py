from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import psutil
import pytest
import yaml
from PIL import Image
from rich.console import Console

from kit.errors import RunError
from kit.runs import RunResult, run_notebook
from kit.runs.kernel import KERNEL_LOG
from kit.runs.resume import resume_notebook
from kit.tracking.run_folder import new_folder
from tests.cases import slow, some
from tests.runs.conftest import MakeNotebook, write_notebook

RECORDS = """\
from kit.config import SessionConfig
from kit.runs import current_run
recorder = current_run()
recorder.start(SessionConfig.preset("tiny").replace("seed", 3))
for step in range(1, steps + 1):
    recorder.step({"rollout/raw_reward": step / steps}, step)
"""


def run(path: Path, **parameters: object) -> tuple[RunResult, str]:
    output = io.StringIO()
    console = Console(file=output, width=100)
    result = run_notebook(path, parameters, out_root=path.parent / "runs", console=console)
    return result, output.getvalue()


def outputs(result: RunResult) -> str:
    """All that the cells printed."""
    cells = nbformat.read(result.notebook, as_version=4).cells
    return "".join(
        output.text
        for cell in cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )


def recorded(result: RunResult) -> dict[str, object]:
    return dict(json.loads((result.folder / "result.json").read_text()))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, str]:
    """A run that trained, as far as its files can tell."""
    folder = tmp_path_factory.mktemp("a folder {with} $HOME")
    where = "import os, sys\nprint(os.getcwd(), sys.executable)"
    return run(write_notebook(folder, RECORDS, where), steps="20")


def test_a_run_leaves_everything_in_one_new_folder(trained: tuple[RunResult, str]) -> None:
    result, shown = trained
    assert result.status == "completed"
    assert re.fullmatch(r"\d{8}-\d{6}-lesson-[0-9a-f]{6}", result.folder.name)
    assert {file.name for file in result.folder.iterdir()} - {KERNEL_LOG} == {
        "config.yaml",
        "figures",
        "metrics.jsonl",
        "notebook.html",
        "notebook.ipynb",
        "params.yaml",
        "result.json",
    }
    assert str(result.folder) in shown


def test_the_result_says_what_ran_with_what_and_how_it_ended(
    trained: tuple[RunResult, str],
) -> None:
    result, _ = trained
    found = recorded(result)
    assert found["status"] == "completed"
    assert found["error"] is None
    assert found["seed"] == 3
    assert found["headline"] == result.headline
    assert result.headline["steps"] == 20
    assert result.headline["reward_last"] == 1.0
    parameters = found["parameters"]
    assert isinstance(parameters, dict)
    assert (parameters["steps"], parameters["rate"], parameters["name"]) == (20, None, "tiny")
    versions = found["versions"]
    assert isinstance(versions, dict)
    assert versions["sglang"] == "0.5.16"


def test_the_kernel_is_this_python_in_the_folder_of_the_notebook(
    trained: tuple[RunResult, str],
) -> None:
    result, _ = trained
    assert outputs(result).strip() == f"{result.folder.parent.parent} {sys.executable}"


def test_progress_names_the_step_and_the_end_that_the_parameters_set(
    trained: tuple[RunResult, str],
) -> None:
    _, shown = trained
    assert "step 20/20 reward 1.000" in shown
    assert "mean reward" in shown


def test_the_picture_is_one(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    with Image.open(result.folder / "figures" / "reward_curve.png") as picture:
        assert picture.width > 300


def test_the_page_fetches_nothing_from_the_network(trained: tuple[RunResult, str]) -> None:
    result, _ = trained
    html = (result.folder / "notebook.html").read_text()
    assert "A lesson" in html
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)\s*=\s*[\"']?(http|//)", html)
    assert not re.search(r"(import|url)\s*\(\s*[\"']?(http|//)", html)


def test_a_notebook_that_raises_is_kept_with_its_failing_cell(make_notebook: MakeNotebook) -> None:
    path = make_notebook("print('so far')", "raise ValueError('boom')", "print('never')")
    result, shown = run(path)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.name, result.error.message, result.error.cell) == (
        "ValueError",
        "boom",
        3,
    )
    assert "Cell 3 failed: ValueError: boom" in shown
    found = recorded(result)
    assert found["status"] == "failed"
    error = found["error"]
    assert isinstance(error, dict)
    assert "raise ValueError" in error["traceback"]
    assert "\x1b" not in error["traceback"]
    assert outputs(result).strip() == "so far"
    assert "boom" in (result.folder / "notebook.html").read_text()


def test_a_kernel_that_dies_is_a_failed_run(make_notebook: MakeNotebook) -> None:
    path = make_notebook("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    result, _ = run(path)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.name, result.error.cell) == ("DeadKernelError", 2)
    assert "SIGKILL" in result.error.message


@pytest.mark.parametrize("ends", ["sys.exit(0)", *slow("sys.exit()", "exit()", "quit()")])
def test_a_cell_that_exits_makes_the_run_failed_and_is_named(
    make_notebook: MakeNotebook, ends: str
) -> None:
    code = f"import pathlib, sys\nif not pathlib.Path('mended').exists():\n    {ends}"
    path = make_notebook("1", f"{code}\nprint('went on')", "print('to the end')")
    result, shown = run(path)
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.name, result.error.cell) == ("SystemExit", 3)
    assert "1 code cell after it did not run" in result.error.message
    assert "Cell 3 failed: SystemExit" in shown
    assert "Cell 3 failed" in (result.folder / "notebook.html").read_text()
    assert "went on" not in outputs(result)
    (path.parent / "mended").touch()
    resumed = resume_notebook(result.folder, console=Console(file=io.StringIO()))
    assert resumed.status == "completed"
    assert outputs(resumed) == "went on\nto the end\n"


def test_an_exit_that_a_cell_is_marked_for_cuts_nothing_off(make_notebook: MakeNotebook) -> None:
    path = make_notebook("raise SystemExit", "print('went on')")
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[2].metadata["tags"] = ["raises-exception"]
    nbformat.write(notebook, path)
    result, _ = run(path)
    assert result.status == "completed"
    assert outputs(result).endswith("went on\n")


def test_a_process_that_ends_itself_is_told_by_its_exit_code_and_cell(
    make_notebook: MakeNotebook,
) -> None:
    result, shown = run(make_notebook("print('so far')", "import os\nos._exit(3)"))
    assert result.status == "failed"
    assert result.error is not None
    assert (result.error.name, result.error.cell) == ("DeadKernelError", 3)
    assert "exit code 3" in result.error.message
    assert "kit run --resume" in shown


@pytest.mark.slow
def test_a_cell_may_put_out_many_megabytes(make_notebook: MakeNotebook) -> None:
    size, pictures = some(3_000_000, 50_000_000), some(300, 3000)
    shows = f"from IPython.display import HTML, display\nfor i in range({pictures}):\n"
    shows += "    display(HTML(f'<b>{i}</b>'))"
    lines = "for i in range(20_000):\n    print(i, 'x' * 50)"
    result, _ = run(make_notebook(f"print('y' * {size})", shows, lines, "print('to the end')"))
    assert result.status == "completed"
    cells = nbformat.read(result.notebook, as_version=4).cells
    assert len(cells[2].outputs[0].text) == size + 1
    assert len(cells[3].outputs) == pictures
    assert len("".join(output.text for output in cells[4].outputs).splitlines()) == 20_000
    assert outputs(result).endswith("to the end\n")


FORKS = """\
import os, sys
children = []
for end in (lambda: sys.exit(0), lambda: sys.exit(3), lambda: 1 / 0, lambda: None):
    children.append(os.fork())
    if not children[-1]:
        end()
        break
else:
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])"""


def test_a_child_that_a_cell_forks_ends_with_the_cell(make_notebook: MakeNotebook) -> None:
    result, _ = run(make_notebook(FORKS, "print('after it')"))
    assert result.status == "completed"
    assert outputs(result).endswith("[0, 3, 1, 0]\nafter it\n")


HOSTILE = (
    "'); import os; os._exit(3)  # ",
    '"""\n' + "\\" * 3,
    "{{name}} {name} %s $HOME `id` $(id)",
    "\x1b[31mred\x07\r\u2028\u202e\x85",
    "ünï ☃ 🐍 \u0000",
    "=a=b",
    "-p",
    "None",
    "1_000",
    "[" * 300,
)
"""Values that end a string, a line or a template, move the cursor, or are taken for options."""


@pytest.mark.parametrize("by", slow("the command", "a call"))
def test_a_parameter_of_text_arrives_as_it_was_given_whatever_it_holds(
    make_notebook: MakeNotebook, by: str
) -> None:
    names = [f"text_{number}" for number in range(len(HOSTILE))]
    parameters = "\n".join(f"{name}: str = ''" for name in names)
    code = f"import json\nprint(json.dumps([{', '.join(names)}]))"
    path = make_notebook(code, parameters=parameters)
    if by == "a call":
        given = list(HOSTILE)
        result, _ = run(path, **dict(zip(names, given, strict=True)))
        folder = result.folder
    else:
        out = path.parent / "runs"
        command = [sys.executable, "-m", "kit", "run", str(path), "--out", str(out)]
        given = [word.replace("\0", "") for word in HOSTILE]  # no argument of a process holds one
        for name, value in zip(names, given, strict=True):
            command += ["-p", name, value]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=path.parent)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        (folder,) = out.iterdir()
    cells = nbformat.read(folder / "notebook.ipynb", as_version=4).cells
    assert json.loads(cells[-1].outputs[0].text) == given
    assert yaml.safe_load((folder / "params.yaml").read_text()) == dict(
        zip(names, given, strict=True)
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("steps", value) for value in ("1e400", "nan", "9" * 5000, "0x", "[]", "-1", "٣x", "")],
        *[
            ("sizes", value)
            for value in ("[" * 5000, "{1: 2}", "!!python/object:os.system", "&a [*a]")
        ],
        *[("fast", value) for value in ("maybe", "2", "\x00")],
        ("__class__", "1"),
        ("steps\n", "1"),
        ("", "1"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_words_before_a_run_has_a_folder(
    make_notebook: MakeNotebook, name: str, value: str
) -> None:
    path = make_notebook("1")
    with pytest.raises(RunError) as refused:
        run(path, **{name: value})
    assert len(str(refused.value)) < 3000
    assert not (path.parent / "runs").exists()


def test_what_children_of_the_kernel_write_is_kept_in_a_log(make_notebook: MakeNotebook) -> None:
    path = make_notebook("import os\nos.write(1, b'from below')\n'last'")
    result, shown = run(path)
    assert "from below" not in shown
    assert result.status == "completed"
    assert "from below" in (result.folder / KERNEL_LOG).read_text()


@pytest.mark.parametrize("last", ["raise ValueError", *slow("'done'", " ")])
def test_a_kernel_that_is_idle_is_not_interrupted_to_end_it(
    make_notebook: MakeNotebook, last: str
) -> None:
    marks = """\
import pathlib
kernel = get_ipython().kernel
kernel.saved_sigint_handler = lambda *_: pathlib.Path("interrupted").touch()"""
    path = make_notebook(marks, last)
    run(path)
    assert not (path.parent / "interrupted").exists()


def test_a_kernel_ends_in_order_where_its_control_thread_is_slow(
    make_notebook: MakeNotebook,
) -> None:
    slow = """\
import os, sys, threading, time

def make_slow(control, stdout, current=threading.current_thread, sleep=time.sleep):
    flush = stdout.flush

    def slowly():
        if current() is control:
            stdout.pub_thread.io_loop.add_callback(sleep, 1)
        flush()

    stdout.flush = slowly

class Last:
    def __del__(self, write=os.write, file=os.open("ended", os.O_CREAT | os.O_WRONLY)):
        write(file, b"in order")

make_slow(get_ipython().kernel.control_thread, sys.stdout)
sys.last = Last()  # ends with the interpreter, after all else, unless it is killed"""
    path = make_notebook(slow)
    result, _ = run(path)
    assert result.status == "completed"
    assert (path.parent / "ended").read_text() == "in order"


def test_a_kernel_ends_with_its_run_and_may_clean_up(make_notebook: MakeNotebook) -> None:
    source = """
    import atexit, os, pathlib
    print(os.getpid())
    atexit.register(pathlib.Path("closed").write_text, "yes")
    """
    path = make_notebook("\n".join(line.strip() for line in source.splitlines()))
    result, _ = run(path)
    assert not psutil.pid_exists(int(outputs(result)))
    assert (path.parent / "closed").read_text() == "yes"


def test_an_unknown_parameter_stops_the_run_before_it_has_a_folder(
    make_notebook: MakeNotebook,
) -> None:
    path = make_notebook("1")
    with pytest.raises(RunError, match="Did you mean 'steps'"):
        run(path, step="3")
    assert not (path.parent / "runs").exists()


def test_runs_of_the_same_second_have_folders_of_their_own(tmp_path: Path) -> None:
    names = [new_folder(tmp_path, "20260131-142501-lesson").name for _ in range(3)]
    assert names == [
        "20260131-142501-lesson",
        "20260131-142501-lesson-2",
        "20260131-142501-lesson-3",
    ]


def test_a_folder_that_cannot_be_made_is_named(make_notebook: MakeNotebook) -> None:
    path = make_notebook("1")
    blocked = path.parent / "a file"
    blocked.write_text("")
    with pytest.raises(RunError, match="a file"):
        run_notebook(path, out_root=blocked, console=Console(file=io.StringIO()))


def test_paths_may_be_relative_to_where_the_run_is_called(
    make_notebook: MakeNotebook, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_notebook("1", name="lessons/one.ipynb")
    monkeypatch.chdir(tmp_path)
    result = run_notebook(
        path.relative_to(tmp_path), out_root="runs", console=Console(file=io.StringIO())
    )
    assert result.folder.parent == tmp_path / "runs"
    assert result.status == "completed"
    assert Path(os.getcwd()) == tmp_path
