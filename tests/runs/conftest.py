"""Small notebooks that need no stack."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """\
steps: int = 5  # training steps
rate: float | None = None  # None takes the preset's
fast = False
name = "tiny"
# first line,
# second line
sizes = [1, 2]
anything = None
computed = 2 * 3
"""

MakeNotebook = Callable[..., Path]


def write_notebook(
    folder: Path, *sources: str, parameters: str = PARAMETERS, name: str = "lesson.ipynb"
) -> Path:
    """Write a notebook of these code cells below a parameters cell; returns its path."""
    cells = [new_markdown_cell("# A lesson")]
    if parameters:
        cells.append(new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    cells += [new_code_cell(source) for source in sources]
    spec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": spec}), path)
    return path


@pytest.fixture
def make_notebook(tmp_path: Path) -> MakeNotebook:
    return partial(write_notebook, tmp_path)
