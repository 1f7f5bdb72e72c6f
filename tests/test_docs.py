"""Pages made of code and lessons show them as they are; those of the course are whole and small."""

from __future__ import annotations

import html
import re
import runpy
from pathlib import Path

import nbformat
import pytest

from tests.lessons import LESSONS, NOTEBOOKS

COURSE = Path(__file__).parent.parent / "docs" / "course"
PAGES = [*LESSONS, "index", "solutions"]
LARGEST = 1_500_000


def page(name: str) -> str:
    return (COURSE / f"{name}.html").read_text("utf-8")


def words(text: str) -> str:
    """Text without tags and spaces, so that a page can be compared with its source."""
    return re.sub(r"\s+", "", html.unescape(re.sub(r"<[^>]*>", "", text)))


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_small_without_scripts_and_fetches_nothing(name: str) -> None:
    text = page(name)
    assert len(text.encode()) < LARGEST
    assert "<script" not in text
    assert not re.search(r"<(link|img|iframe)[^>]*(src|href)\s*=\s*[\"']?(http|//)", text)
    assert not re.search(r"@import|url\(\s*[\"']?(http|//)", text)


def test_no_style_sheet_fetches_anything() -> None:
    sheets = list(COURSE.glob("*.css"))
    assert len(sheets) == 2
    for sheet in sheets:
        assert not re.search(r"@import|url\(\s*[\"']?(http|//)", sheet.read_text("utf-8")), sheet


@pytest.mark.parametrize("name", PAGES)
def test_every_link_of_a_page_leads_to_a_page_that_is_there(name: str) -> None:
    for target in re.findall(r'href="([^"#]+)"', page(name)):
        assert (COURSE / target).is_file(), target


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_page_shows_the_cells_of_its_lesson_as_they_are_now(lesson: str) -> None:
    shown = words(page(lesson))
    for cell in nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4).cells:
        if cell.cell_type == "code":
            assert words(html.escape(cell.source)) in shown, f"run `make docs`:\n{cell.source}"


@pytest.mark.parametrize("lesson", LESSONS)
def test_no_cell_of_a_page_failed_and_none_names_a_place_on_the_machine_that_made_it(
    lesson: str,
) -> None:
    text = page(lesson)
    assert "Traceback (most recent call last)" not in text
    assert not re.search(r"(?<![\w.])/(tmp|home|root|work|Users)/\w", text)


def test_the_index_has_every_lesson_with_its_times() -> None:
    index = page("index")
    assert all(f'href="{lesson}.html"' in index for lesson in LESSONS)
    assert len(re.findall(r"\d+ minutes to read, \d+ to do", index)) == len(LESSONS)


@pytest.mark.parametrize("name", ["settings.md", "api.md"])
def test_the_reference_is_made_of_the_present_settings_and_docstrings(name: str) -> None:
    made = runpy.run_path(str(COURSE.parent / "make_reference.py"))
    pages = {path.name: make for path, make in made["PAGES"].items()}
    current = (COURSE.parent / name).read_text("utf-8")
    assert current == pages[name](), "run `make reference`"
