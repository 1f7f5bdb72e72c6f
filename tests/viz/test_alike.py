"""Equal answers to a prompt are shown once, with their count, and what differs stays reachable."""

from __future__ import annotations

import re
from dataclasses import replace

from kit.reports import EvalReport
from kit.samples import Batch, Rollout, Sample, Status
from kit.viz import compare_samples
from kit.viz.samples.alike import alike, number_of_all
from kit.viz.samples.browser_widgets import EACH
from tests.viz.conftest import Show
from tests.viz.results import make_evaluation


def sample(response: str, index: int = 0, reward: float | None = 1.0, **fields: object) -> Sample:
    made = Sample(
        index=index, prompt="3+31=", response=response, response_length=2, tokens=[5, 6, 7],
        reward=reward, label="34", status=Status.COMPLETED, rollout_log_probs=[-0.5, -index / 4],
    )  # fmt: skip
    return replace(made, **fields)  # type: ignore[arg-type]


def group() -> list[Sample]:
    """Seven times 34, and once 24, which came fourth."""
    answers = ["34"] * 3 + ["24"] + ["34"] * 4
    return [sample(text, i, float(text == "34")) for i, text in enumerate(answers)]


def rows(page: str) -> list[str]:
    """The rows of the outer tables, as words."""
    page = re.sub(r'<table class="kv-grid">.*?</table>', "", page.split("</style>")[-1])
    return [re.sub(r"<[^>]+>", " ", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]


def test_seven_equal_answers_are_one_row_with_their_count(html: Show, plain: Show) -> None:
    rollout = Rollout(group())
    seven, one = rows(html(rollout))[1:]
    assert "7 × 34" in " ".join(seven.split())
    assert "24" in one
    assert "×" not in one
    assert "7 × 34" in plain(rollout)
    assert plain(rollout).count("✓ completed") == 2


def test_every_sample_behind_a_count_has_a_line_with_reward_and_log_prob(html: Show) -> None:
    scored = [s.with_reward(0.1 * s.index) for s in group()]
    page = html(Rollout(scored))
    inner = re.search(r'<table class="kv-grid">.*?</table>', page)
    assert inner
    lines = re.findall(r"<tr><td>(.*?)</td></tr>", inner[0])
    assert [line.split("</td><td>")[0] for line in lines] == ["0", "1", "2", "4", "5", "6", "7"]
    assert lines[-1] == "7</td><td>0.7</td><td>-1.12"
    assert "0 to 0.7" in page


def test_answers_that_differ_in_status_error_or_label_stay_apart() -> None:
    same = sample("34")
    others = [
        same,
        replace(same, status=Status.TRUNCATED),
        same.with_failure("ValueError: no"),
        replace(same, label="35"),
        same,
    ]
    assert alike(others) == [[0, 4], [1], [2], [3]]


def test_a_batch_shows_equal_answers_once_with_their_advantage(html: Show, plain: Show) -> None:
    advantages = tuple(0.35 if s.response == "34" else -2.47 for s in group())
    batch = Batch(tuple(group()), advantages)
    assert len(rows(html(batch))) == 3
    assert "7 × 34" in plain(batch)
    assert "+0.35" in plain(batch)


def test_an_evaluation_with_several_responses_shows_each_answer_once(html: Show) -> None:
    report = replace(make_evaluation(size=8), rollout=Rollout(group()), prompts=1)
    assert isinstance(report, EvalReport)
    page = html(report)
    assert "✗ not always right: 1 prompt" in page
    assert "<b>7 × </b>" in page
    assert ">0.875</td>" in page


def test_a_comparison_shows_the_commonest_answers_of_both(html: Show) -> None:
    before = Rollout([sample("24", i, 0.0) for i in range(8)])
    shown = compare_samples(before, Rollout(group()))
    assert "<b>8 × </b>" in shown.html
    assert "<b>7 × </b>" in shown.html
    assert "8 × 24" in str(shown)
    assert "7 × 34" in str(shown)


def test_one_number_is_said_once_and_several_as_a_span() -> None:
    assert number_of_all([0.5, 0.5]) == "0.5"
    assert number_of_all([0.5, None, 0.25]) == "0.25 to 0.5"
    assert number_of_all([-0.5, 0.5], signed=True) == "-0.5 to +0.5"
    assert number_of_all([None]) == "–"


def test_the_browser_lists_equal_answers_in_one_line_or_each_on_its_own() -> None:
    browser = Rollout(group()).browse()
    assert browser.listed == [0, 3]
    said = browser.controls.status.value
    assert "8 of 8 samples listed in 2 lines, equal answers once, number 1 selected" in said
    assert browser.controls.list.options[0][0].endswith("→ 7 × 34".replace(" ", "\u00a0"))
    assert "7 samples with this answer" in browser.controls.sample.value
    browser.controls.list.index = 1
    browser.controls.equal.value = EACH
    assert browser.listed == list(range(8))
    assert browser.position == 3
    browser.controls.list.index = 5
    browser.reset()
    assert (browser.listed, browser.position) == ([0, 3], 0), "the line that stands for it"


def test_a_marked_sample_of_the_browser_has_a_line_of_its_own() -> None:
    browser = Rollout(group()).browse()
    browser.mark("odd", position=4)
    assert browser.listed == [0, 3, 4]
    assert [mark.index for mark in browser.marks] == [4]
