"""The first line of a docstring can be read without the code around it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

KIT = Path(__file__).parent.parent / "kit"
ROOMS = sorted({path.relative_to(KIT).parts[0] for path in KIT.rglob("*.py")})
LEANS_ON_ITS_NEIGHBOURS = re.compile(
    r"(Of|The same|From now on|As (there|before|above)|See (there|above)|Likewise|Ditto|And|Or|But|"
    r"Also)\b"
)


def first_lines(room: str) -> Iterator[tuple[str, str]]:
    place = KIT / room
    for path in [place] if place.is_file() else sorted(place.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                name = getattr(node, "name", "")
                for line in (ast.get_docstring(node) or "").splitlines()[:1]:
                    yield f"{path.relative_to(KIT)}:{getattr(node, 'lineno', 1)} {name}", line


@pytest.mark.parametrize("room", ROOMS)
def test_the_first_line_of_a_docstring_stands_alone(room: str) -> None:
    refused = [
        f"{place}: {line}"
        for place, line in first_lines(room)
        if LEANS_ON_ITS_NEIGHBOURS.match(line) or "?" in re.sub(r"`[^`]*`", "", line)
    ]
    assert refused == []
