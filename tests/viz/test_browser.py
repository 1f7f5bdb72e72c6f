"""The sample browser, worked as a person works it: through its boxes, menus and buttons."""

from __future__ import annotations

import json
import re
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from kit.errors import DataError
from kit.samples import Rollout, Sample, Status
from kit.viz.live.frontend import show_lasting
from kit.viz.samples import browser as browser_module
from kit.viz.samples.browser import SampleBrowser
from tests.viz.results import make_rollout
from tests.viz.test_hostile_text import HOSTILE, assert_harmless, assert_visible


def sample(group: int, index: int, **fields: Any) -> Sample:
    made = Sample(
        group_index=group, index=index, prompt=f"prompt {group}", response=f"answer {index}",
        response_length=1, tokens=[1, 2], reward=0.0, status=Status.COMPLETED,
        rollout_log_probs=[-0.5],
    )  # fmt: skip
    return replace(made, **fields)


ROLLOUT = Rollout(
    [
        sample(0, 0, reward=1.0, response_length=2, tokens=[1, 2, 3], rollout_log_probs=[-1, -2]),
        sample(0, 1, status=Status.TRUNCATED),
        sample(1, 2, reward=0.5, response="the Carry is lost"),
        sample(1, 3).with_failure("ValueError: no digit"),
        sample(2, 4, reward=-1.0, label="carry"),
        sample(2, 5, reward=None, status=Status.ABORTED),
    ],
    step=7,
)


@pytest.fixture
def browser() -> SampleBrowser:
    return ROLLOUT.browse()


def shown(browser: SampleBrowser) -> str:
    page: str = browser.controls.sample.value
    return page


def said(browser: SampleBrowser) -> str:
    """The status line, without its style sheet."""
    return re.sub(r"<style>.*?</style>|<[^>]+>", "", browser.controls.status.value)


# ---- filtering and sorting ---------------------------------------------------------------------


def test_every_sample_is_listed_at_first(browser: SampleBrowser) -> None:
    assert browser.listed == [0, 1, 2, 3, 4, 5]
    assert len(browser.controls.list.options) == 6
    assert said(browser) == "6 of 6 samples listed, number 1 selected"
    assert "Sample 0 of prompt 0" in shown(browser)


@pytest.mark.parametrize(
    ("box", "value", "left"),
    [
        ("reward_from", "0.5", [0, 2]),
        ("reward_to", "0", [1, 4]),
        ("length_from", "2", [0]),
        ("length_to", "1", [1, 2, 3, 4, 5]),
        ("status_is", "failed", [3]),
        ("status_is", "truncated", [1]),
        ("text", "CARRY", [2, 4]),
        ("text", "prompt 2", [4, 5]),
        ("text", "no digit", [3]),
        ("text", "nobody says this", []),
    ],
)
def test_a_filter_lists_what_fits(
    browser: SampleBrowser, box: str, value: str, left: list[int]
) -> None:
    getattr(browser.controls, box).value = value
    assert browser.listed == left


def test_filters_add_up_and_show_all_takes_them_away(browser: SampleBrowser) -> None:
    browser.controls.reward_from.value = "0"
    browser.controls.text.value = "prompt 1"
    browser.controls.order.value = "lowest reward first"
    assert browser.listed == [2]
    browser.controls.reset.click()
    assert browser.listed == [0, 1, 2, 3, 4, 5]
    assert browser.controls.text.value == browser.controls.reward_from.value == ""


@pytest.mark.parametrize("text", ["abc", "1,5", "nan"])
def test_a_bound_that_is_no_number_bounds_nothing_and_is_named(
    browser: SampleBrowser, text: str
) -> None:
    browser.controls.reward_from.value = text
    assert len(browser.listed) == 6
    assert f"Reward from: {text} is no number, so it bounds nothing" in said(browser)
    browser.controls.reward_from.value = "1"
    assert "no number" not in said(browser)


def test_where_nothing_fits_nothing_is_selected(browser: SampleBrowser) -> None:
    browser.controls.text.value = "nobody says this"
    assert browser.sample is browser.position is None
    assert "No sample fits the filter." in shown(browser)
    assert browser.controls.next.disabled
    browser.controls.next.click()
    browser.controls.next_group.click()
    browser.controls.labels["good"].click()
    assert browser.marks == ()
    browser.controls.text.value = ""
    assert not browser.controls.next.disabled
    assert browser.position == 0


@pytest.mark.parametrize(
    ("order", "listed"),
    [
        ("highest reward first", [0, 2, 1, 4, 3, 5]),
        ("lowest reward first", [4, 1, 2, 0, 3, 5]),
        ("highest length first", [0, 1, 2, 3, 4, 5]),
        ("lowest mean log-prob first", [0, 1, 2, 3, 4, 5]),
    ],
)
def test_samples_without_the_number_come_last(
    browser: SampleBrowser, order: str, listed: list[int]
) -> None:
    browser.controls.order.value = order
    assert browser.listed == listed


def test_the_selected_sample_stays_selected_while_it_is_listed(browser: SampleBrowser) -> None:
    browser.controls.list.index = 4
    browser.controls.order.value = "lowest reward first"
    assert (browser.position, browser.controls.list.index) == (4, 0)
    browser.controls.reward_from.value = "0"
    assert browser.position == 1


def test_numbers_of_ones_own_are_shown_and_sorted_by() -> None:
    browser = SampleBrowser(ROLLOUT, numbers={"judge": [3, 1, None, 5, 2, 4]})
    browser.controls.order.value = "highest judge first"
    assert browser.listed == [3, 5, 0, 4, 1, 2]
    browser.move(-5)
    assert "<b>5</b> <span>judge</span>" in shown(browser)
    with pytest.raises(DataError, match=r"numbers\['judge'\] has 1 values for 6 samples"):
        SampleBrowser(ROLLOUT, numbers={"judge": [1]})


# ---- stepping ----------------------------------------------------------------------------------


def test_list_box_and_buttons_step_through_samples_and_agree(browser: SampleBrowser) -> None:
    controls = browser.controls
    controls.list.index = 2
    assert (browser.position, controls.line.value) == (2, 3)
    controls.line.value = 5
    assert (browser.position, controls.list.index) == (4, 4)
    controls.next.click()
    controls.next.click()
    assert (browser.position, controls.line.value) == (5, 6)
    controls.previous.click()
    assert (browser.position, controls.line.value) == (4, 5)
    assert "Sample 4 of prompt 2" in shown(browser)


def test_group_buttons_go_to_the_first_sample_of_a_group_and_stop_at_the_ends(
    browser: SampleBrowser,
) -> None:
    visited = []
    for _ in range(3):
        browser.controls.next_group.click()
        visited.append(browser.position)
    browser.controls.next.click()
    for _ in range(3):
        browser.controls.previous_group.click()
        visited.append(browser.position)
    assert visited == [2, 4, 4, 2, 0, 0]


def test_groups_are_stepped_through_as_they_are_listed(browser: SampleBrowser) -> None:
    browser.controls.order.value = "lowest reward first"
    browser.move(-6)
    visited = [browser.position]
    for _ in range(2):
        browser.controls.next_group.click()
        visited.append(browser.position)
    assert visited == [4, 1, 2]


def test_only_the_selected_sample_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    real = browser_module.sample_body
    monkeypatch.setattr(
        browser_module, "sample_body", lambda s: (drawn.append(s.index), real(s))[1]
    )
    samples = [
        Sample(group_index=i // 8, index=i, response=f"word {i} " * 1000, response_length=1000,
               tokens=[7] * 1000, rollout_log_probs=[-0.1] * 1000, reward=float(i % 2))
        for i in range(512)
    ]  # fmt: skip
    browser = Rollout(samples).browse()
    browser.controls.line.value = 100
    browser.controls.reward_to.value = "0"
    assert drawn == [0, 99, 0]


def test_every_control_has_a_name(browser: SampleBrowser) -> None:
    import ipywidgets as widgets

    def walk(widget: Any) -> Any:
        yield widget
        for child in getattr(widget, "children", ()):
            yield from walk(child)

    inputs = [w for w in walk(browser.controls.root) if not isinstance(w, widgets.Box)]
    for widget in inputs:
        if not isinstance(widget, widgets.HTML):
            assert widget.description or widget.tooltip


# ---- marks -------------------------------------------------------------------------------------


def test_a_mark_and_a_note_come_back_as_a_frozen_record(browser: SampleBrowser) -> None:
    browser.controls.list.index = 2
    browser.controls.labels["odd"].click()
    browser.controls.note.value = "  forgets to carry "
    (mark,) = browser.marks
    assert (mark.label, mark.note) == ("odd", "forgets to carry")
    assert (mark.step, mark.group_index, mark.index, mark.reward) == (7, 1, 2, 0.5)
    assert (mark.prompt, mark.response) == ("prompt 1", "the Carry is lost")
    with pytest.raises(FrozenInstanceError):
        mark.note = "x"  # type: ignore[misc]


def test_a_mark_is_seen_in_the_list_on_its_button_and_in_the_status(
    browser: SampleBrowser,
) -> None:
    browser.controls.labels["bad"].click()
    assert "bad" in browser.controls.list.options[0][0]
    assert browser.controls.labels["bad"].description == "● bad"
    assert said(browser).endswith("marked: 1 bad")
    browser.controls.next.click()
    assert browser.controls.labels["bad"].description == "○ bad"
    assert browser.controls.note.value == ""


def test_another_label_replaces_the_first_and_the_same_again_takes_it_back(
    browser: SampleBrowser,
) -> None:
    browser.controls.labels["good"].click()
    browser.controls.labels["bad"].click()
    assert [mark.label for mark in browser.marks] == ["bad"]
    browser.controls.labels["bad"].click()
    assert browser.marks == ()


def test_a_note_stays_with_its_sample_when_one_goes_on(browser: SampleBrowser) -> None:
    browser.controls.note.value = "first"
    browser.controls.next.click()
    browser.controls.note.value = "second"
    browser.controls.previous.click()
    assert browser.controls.note.value == "first"
    assert [(mark.index, mark.note) for mark in browser.marks] == [(0, "first"), (1, "second")]


def test_samples_are_filtered_by_their_marks(browser: SampleBrowser) -> None:
    browser.mark("good", position=1)
    browser.mark("bad", position=3)
    browser.mark(note="look again", position=5)
    listed = {}
    for choice in ("good", "bad", "odd", "any mark or note", "neither"):
        browser.controls.mark_is.value = choice
        listed[choice] = browser.listed
    assert list(listed.values()) == [[1], [3], [], [1, 3, 5], [0, 2, 4]]


def test_a_sample_that_is_marked_out_of_the_filter_is_not_pulled_away(
    browser: SampleBrowser,
) -> None:
    browser.controls.mark_is.value = "neither"
    browser.controls.labels["good"].click()
    assert browser.position == 0
    browser.controls.note.value = "why"
    assert browser.marks[0].note == "why"


def test_marks_as_a_table_and_as_json_lines_and_back(
    browser: SampleBrowser, tmp_path: Path
) -> None:
    browser.mark("good", "half \ud800, ␀ and \x00", position=4)
    browser.mark("bad", position=0)
    table = browser.marks_to_pandas()
    assert list(table["label"]) == ["bad", "good"]
    path = browser.save_marks(tmp_path / "marks.jsonl")
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 4]
    other = ROLLOUT.browse()
    assert other.load_marks(path) == 2
    assert other.marks == browser.marks
    assert list(ROLLOUT.browse().marks_to_pandas().columns) == list(table.columns)


def test_loading_takes_the_marks_that_fit_and_says_how_many(
    browser: SampleBrowser, tmp_path: Path
) -> None:
    browser.mark("good", position=1)
    browser.mark("bad", position=4)
    path = browser.save_marks(tmp_path / "marks.jsonl")
    part = ROLLOUT[3:].browse()
    assert part.load_marks(path) == 1
    assert [mark.index for mark in part.marks] == [4]
    with pytest.raises(DataError, match="none of 2 marks fits a sample of this rollout"):
        make_rollout().browse().load_marks(path)
    with pytest.raises(DataError, match="'bad', which this browser does not know"):
        ROLLOUT.browse(labels=("good", "wrong")).load_marks(path)


def test_a_broken_line_of_marks_is_named_and_nothing_is_taken(
    browser: SampleBrowser, tmp_path: Path
) -> None:
    path = tmp_path / "marks.jsonl"
    path.write_text('{"label": "good"}\n{"tag": 1}\n')
    with pytest.raises(DataError, match="line 2: not a mark"):
        browser.load_marks(path)
    assert browser.marks == ()


def test_an_unknown_label_or_sample_is_an_error(browser: SampleBrowser) -> None:
    with pytest.raises(DataError, match=r"no mark 'goood'.*\n.*Did you mean 'good'"):
        browser.mark("goood")
    with pytest.raises(DataError, match="position 6 was asked for"):
        browser.mark("good", position=6)


# ---- how it is shown ---------------------------------------------------------------------------


def test_where_nobody_watches_it_shows_what_the_rollout_shows(browser: SampleBrowser) -> None:
    assert browser._repr_mimebundle_() == ROLLOUT._repr_mimebundle_()


def displayed(monkeypatch: pytest.MonkeyPatch, how: str, browser: SampleBrowser) -> list[Any]:
    outputs: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda data, **_: outputs.append(data))
    monkeypatch.setattr("kit.viz.live.frontend.frontend", lambda: how)
    browser._ipython_display_()
    return outputs


def test_a_run_that_nobody_watches_keeps_the_picture_alone(
    browser: SampleBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert displayed(monkeypatch, "headless", browser) == [ROLLOUT._repr_mimebundle_()]


def test_a_notebook_gets_the_widgets_and_a_picture_that_gives_way_to_them(
    browser: SampleBrowser, monkeypatch: pytest.MonkeyPatch
) -> None:
    widget, picture = displayed(monkeypatch, "live", browser)
    view = widget["application/vnd.jupyter.widget-view+json"]
    assert view["model_id"] == browser.controls.root.model_id
    assert widget["text/html"] == ""
    (live,) = re.findall(r"body:has\(\.(kit-live-\w+)", picture["text/html"])
    assert live in browser.controls.root._dom_classes
    assert "Rollout of step 7" in picture["text/html"]
    assert picture["text/plain"] == ROLLOUT._repr_mimebundle_()["text/plain"]
    assert show_lasting.__doc__


def test_an_empty_rollout_can_be_browsed() -> None:
    browser = Rollout([]).browse()
    assert "The rollout is empty." in shown(browser)
    assert browser.marks == ()


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: ascii(text[:16]))
def test_hostile_text_stays_in_its_place(text: str) -> None:
    fields = {"prompt": text, "response": text, "label": text, "error": text}
    browser = SampleBrowser(Rollout([sample(0, 0, **fields)]), (text,), {text: [1.0]})
    browser.mark(text, text)
    controls = browser.controls
    browser.controls.reward_from.value = text
    for page in (controls.sample.value, controls.status.value):
        assert_harmless(page)
        assert len(page) < 300_000
    for words in (controls.list.options[0][0], *(b.description for b in controls.labels.values())):
        assert_visible(words)
        assert len(words) < 300
