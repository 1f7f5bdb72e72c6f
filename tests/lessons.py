"""The lessons as tests run them: with the published solutions in place of the stubs."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from rich.console import Console

from kit.runs import RunResult, run_notebook
from kit.tracking.recorder import GROUP_VARIABLE
from kit.utils.reading import read_object

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
LESSONS = sorted(path.stem for path in (NOTEBOOKS / "solutions").glob("*.md"))
FAST: dict[str, dict[str, Any]] = {
    "01_one_step": {"prompts": 8},
    "02_train_to_solve": {"steps": 20, "seed": 1, "eval_every": 0},
    "05_estimators": {"steps": 2, "contenders": ["rloo"]},
    "06_reading_runs": {"steps": 10},
    "08_exactly_zero": {"steps": 3},
    "09_lora": {"steps": 4, "ranks": [1], "turns": 6},
    "13_speculative": {"draft_steps": 30, "longest": 4, "steps": 8},
    "14_low_precision": {"steps": 6},
}
"""Other values than a notebook's own, by its name, so that each takes a minute at most."""


def solutions(lesson: str) -> dict[str, str]:
    """The code of each solution, by the number of its exercise: `01.2`."""
    text = (NOTEBOOKS / "solutions" / f"{lesson}.md").read_text("utf-8")
    blocks = re.findall(r"^## (\d)\. .*?^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return {f"{lesson[:2]}.{number}": code for number, code in blocks}


def exercise_cells(notebook: nbformat.NotebookNode) -> dict[str, nbformat.NotebookNode]:
    """The cells to fill in, by the number of their exercise."""
    return {
        tag.removeprefix("exercise-"): cell
        for cell in notebook.cells
        for tag in cell.metadata.get("tags", [])
        if tag.startswith("exercise-")
    }


def solved(lesson: str, folder: Path) -> Path:
    """A copy of a lesson, with the solutions in its cells."""
    notebook = nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4)
    for number, cell in exercise_cells(notebook).items():
        before = "from kit.course import check\n" if "import check" in cell.source else ""
        end = cell.source[cell.source.index(f'check("{number}"') :]
        cell.source = f"{before}{solutions(lesson)[number]}\n{end}"
    target = folder / f"{lesson}.ipynb"
    nbformat.write(notebook, target)
    return target


def run(lesson: str, folder: Path) -> RunResult:
    """Run a solved lesson from top to bottom, as a batch run. It must reach its end."""
    return run_quietly(solved(lesson, folder), FAST.get(lesson, {}), folder)


def run_quietly(notebook: Path, parameters: dict[str, Any], folder: Path) -> RunResult:
    """Run a notebook with other values than its own, in a folder. It must reach its end."""
    quiet = Console(file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(GROUP_VARIABLE, "lessons")  # one stack for all of them
        result = run_notebook(notebook, parameters, out_root=folder, console=quiet)
    assert result.error is None, result.error.traceback
    return result


def notebook_times(folder: Path) -> list[str]:
    """A line for each run of the project's notebooks below a folder: name, seconds, steps."""
    names = {path.stem for path in NOTEBOOKS.glob("*.ipynb")}
    rows = []
    for file in sorted(folder.rglob("result.json")):
        try:
            result = read_object(file)
        except (OSError, ValueError):  # of a test of such files
            continue
        name = Path(str(result.get("notebook", ""))).stem
        if name in names:
            rows.append((name, result["seconds"], result["headline"]["steps"], result["status"]))
    rows.sort()
    total = sum(seconds for _, seconds, *_ in rows)
    lines = [
        f"{seconds:7.1f} s  {steps or 0:4d} steps  {name}"
        + ("" if how == "completed" else f" ({how})")
        for name, seconds, steps, how in rows
    ]
    return [*lines, f"{total:7.1f} s  in all"] if lines else []


def texts(result: RunResult) -> str:
    """Everything that the cells show, as plain text."""
    cells = nbformat.read(result.notebook, as_version=4).cells
    outputs = [o for cell in cells for o in cell.get("outputs", [])]
    return "\n".join(o.get("data", {}).get("text/plain", "") or o.get("text", "") for o in outputs)
