"""docs/reliability.md names tests that there are, and every test of this folder."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent.parent
PAGE = (TESTS.parent / "docs" / "reliability.md").read_text("utf-8")


def promises_of(folder: Path) -> set[str]:
    text = "\n".join(file.read_text("utf-8") for file in folder.rglob("test_*.py"))
    return set(re.findall(r"^(?:async )?def (test_\w+)", text, re.MULTILINE))


def test_every_test_that_the_page_names_is_there() -> None:
    assert set(re.findall(r"`(test_\w+)`", PAGE)) <= promises_of(TESTS)


def test_every_fault_that_is_tested_here_is_on_the_page() -> None:
    own = promises_of(Path(__file__).parent) - promises_of_this_file()
    assert own <= set(re.findall(r"`(test_\w+)`", PAGE))


def promises_of_this_file() -> set[str]:
    return set(re.findall(r"^def (test_\w+)", Path(__file__).read_text("utf-8"), re.MULTILINE))
