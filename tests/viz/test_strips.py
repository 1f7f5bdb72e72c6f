"""What a strip shows of tokens: every one, its number, its class, and the one that stands out."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from benchmarks.displays import response
from kit.errors import DataError
from kit.samples import Sample, token_values
from kit.viz.samples.scales import scale_of
from tests.viz.conftest import Show

LIMIT = 300_000


def sample(texts: list[str], **values: list[float]) -> Sample:
    made = Sample(
        prompt="1+1=",
        tokens=[1, 2, *range(10, 10 + len(texts))],
        response="".join(texts),
        response_length=len(texts),
        metadata={"token_texts": texts},
        rollout_log_probs=values.pop("rollout_log_prob", None),
    )
    return replace(made, token_values=values)


def chips(page: str) -> list[tuple[str, str, str]]:
    """(style, title, text) of each chip."""
    (drawn,) = re.findall(r'<div class="kv-strip">(.*?)</div>', page, re.DOTALL)
    return re.findall(r'<i(?: class="([^"]*)")? title="([^"]*)">(.*?)</i>', drawn)


def test_white_space_and_special_tokens_are_visible_and_lines_break_where_the_text_does() -> None:
    texts = ["a b", "\n", "\t", "  ", "<|end|>", "", "\x1b"]
    page = sample(texts, entropy=[0.0] * 7).strip(quantity="entropy").html
    shown = [text for *_, text in chips(page)]
    assert shown == ["a␣b", "↵", "⇥", "␣␣", "&lt;|end|&gt;", "∅", "␛"]
    assert "↵</i><br>" in page
    assert page.count("<br>") == 1


def test_the_caret_is_on_the_token_that_stands_out() -> None:
    lows = sample(["a", "b", "c"], rollout_log_prob=[-0.1, -5.0, -1.0]).strip()
    assert [text for *_, text in chips(lows.html)] == ["a", "b<b>^</b>", "c"]
    assert "least likely: token 1, " in lows.html
    moved = sample(["a", "b"], trainer_log_prob=[-1.0, -1.0], trainer_log_prob_before=[-4.0, -0.5])
    assert [text for *_, text in chips(moved.strip().html)] == ["a<b>^</b>", "b"]
    alike = sample(["a", "b"], advantage=[0.5, 0.5]).strip(quantity="advantage")
    assert "^" not in alike.html


def test_a_caret_in_a_terminal_points_at_its_token() -> None:
    lines = str(sample(["2", "\n", "7"], rollout_log_prob=[-0.1, -0.2, -3.0]).strip()).splitlines()
    place = next(i for i, line in enumerate(lines) if "1+1=2↵7" in line)
    assert lines[place].index("7") == lines[place + 1].index("^")


def test_the_legend_counts_every_token_once() -> None:
    page = sample(
        list("abcde"), rollout_log_prob=[math.log(p) for p in (0.99, 0.95, 0.6, 0.2, 0.001)]
    )
    legend = page.strip().html.split('class="kv-legend">')[1].split("</div>")[0]
    assert re.findall(r"<i[^>]*>(\d+)</i> ([^<]*)<", legend) == [
        ("2", "over 90%"), ("1", "50–90%"), ("1", "10–50%"), ("0", "1–10%"), ("1", "under 1%"),
    ]  # fmt: skip


def test_a_sign_is_a_colour_an_edge_and_a_word() -> None:
    page = sample(list("abc"), loss=[-1.0, 0.0, 1.0]).strip(quantity="loss").html
    assert [(style, title.split(", ")[2]) for style, title, _ in chips(page)] == [
        ("d3 w", "loss -1"), ("", "loss 0"), ("u3", "loss +1"),
    ]  # fmt: skip
    assert "▼ -1 or less" in page
    assert "▲ +1 or more" in page
    assert "sum 0, smallest -1, largest +1" in page
    style = page.split("</style>")[0]
    assert re.search(r"i\.u3\{[^}]*border-top:", style)
    assert re.search(r"i\.d3\{[^}]*border-bottom:", style)


@pytest.mark.parametrize("kind", ["change", "ratio", "entropy", "rollout_log_prob", "own"])
def test_a_larger_number_never_falls_into_a_lower_class(kind: str) -> None:
    values = sorted([-3.0, -0.2, -1e-9, 0.0, 1e-9, 0.1, 0.5, 2.0, 40.0, math.inf])
    if kind == "ratio":
        values = [abs(v) for v in values if v > 0]
    scale = scale_of(token_values.quantity(kind, values), values)
    places = [scale.place(value) for value in values]
    rising = places if kind != "rollout_log_prob" else places[::-1]
    assert rising == sorted(rising)
    assert sum(scale.counts([*values, math.nan])) == len(values)


def test_agreement_as_close_as_rounding_has_no_colour() -> None:
    both = sample(
        list("ab"), rollout_log_prob=[-1.0, -2.0], trainer_log_prob=[-1.000001, -2.000002]
    )
    for name in ("difference", "ratio"):
        assert {style.replace("w", "") for style, *_ in chips(both.strip(quantity=name).html)} == {
            ""
        }


def test_differences_ratios_and_changes_are_worked_out() -> None:
    known = sample(
        list("ab"),
        rollout_log_prob=[-1.0, -2.0],
        trainer_log_prob=[-1.5, -2.0],
        trainer_log_prob_before=[-1.0, -2.5],
    )
    assert token_values.require(known, "difference") == [-0.5, 0.0]
    assert token_values.require(known, "ratio") == [math.exp(-0.5), 1.0]
    assert token_values.require(known, "change") == [-0.5, 0.5]
    assert token_values.known(known)[0] == "change"


def test_a_ratio_of_the_impossible_is_bounded() -> None:
    odd = sample(list("ab"), rollout_log_prob=[-math.inf, -1.0], trainer_log_prob=[-1.0, -math.inf])
    assert token_values.require(odd, "ratio") == [math.exp(20), math.exp(-20)]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("entropy", r"call `rollout = session\.annotate\(rollout\)`"),
        ("difference", r"call `rollout = session\.annotate\(rollout\)`"),
        ("change", "before and after an update"),
        ("advantage", r"batch = session\.annotate\(session\.advantages\(rollout\)\)"),
        ("loss", r"batch = session\.annotate\(session\.advantages\(rollout\)\)"),
        ("entrpy", r"Did you mean 'entropy'\?"),
        ("own", "no quantity 'own'"),
    ],
)
def test_what_is_not_known_says_what_to_call(name: str, says: str) -> None:
    made = sample(list("ab"), rollout_log_prob=[-1.0, -2.0])
    with pytest.raises(DataError, match=says) as caught:
        made.strip(quantity=name)
    assert "rollout_log_prob" in str(caught.value)


def test_a_response_without_tokens_has_no_strip() -> None:
    with pytest.raises(DataError, match="no response tokens"):
        Sample().strip()


def test_a_quantity_of_ones_own_is_drawn_with_the_rest(html: Show) -> None:
    made = sample(list("ab"), surprise_of_mine=[1.0, -3.0])
    page = made.strip(quantity="surprise_of_mine").html
    assert "surprise of mine -3" in page
    assert "surprise_of_mine: mean -1" in page
    assert "all tokens as a table" in html(made)


def test_every_token_has_a_row_with_all_that_is_known(html: Show) -> None:
    page = html(sample(["x", " y"], rollout_log_prob=[-0.5, -1.0], entropy=[0.25, 0.5]))
    body = page.split("all tokens as a table")[1]
    rows = [re.findall(r">([^<]+)<", row) for row in body.split("</tr>")[1:3]]
    assert rows == [["0", "x", "10", "-0.5", "0.25"], ["1", "␣y", "11", "-1", "0.5"]]


def test_a_number_that_is_none_is_marked_and_counted() -> None:
    page = sample(list("abc"), entropy=[math.nan, 1.0, math.inf]).strip(quantity="entropy").html
    assert [style for style, *_ in chips(page)] == ["q", "p3", "p4 w"]
    assert "not a number" in page
    every = sample(list("ab"), loss=[math.nan] * 2).strip(quantity="loss")
    assert "NaN" in every.html


def test_a_short_sample_has_all_quantities_behind_lines_to_click_on(html: Show) -> None:
    page = html(response(50, annotated=True))
    for words in ("entropy of the trainer", "advantage", "share of the update", "importance ratio"):
        assert f"<summary>by {words}" in page
    assert page.count('class="kv-strip"') == 9


def test_a_long_sample_names_the_quantities_that_it_has_no_room_for(html: Show) -> None:
    page = html(response(4_000, annotated=True))
    assert page.count('class="kv-strip"') == 1
    assert "Also known: sample.strip(&#34;rollout_log_prob&#34;)" in page


def test_the_versions_that_a_change_lies_between_are_named() -> None:
    made = replace(
        sample(list("ab"), trainer_log_prob=[-1.0, -1.0], trainer_log_prob_before=[-2.0, -1.0]),
        annotated_versions=[3, 4],
    )
    assert "weights version 3 to 4" in made.strip().html
    assert "trainer at weights version 4" in made.strip(quantity="trainer_log_prob").html
    before = made.strip(quantity="trainer_log_prob_before").html
    assert "trainer at weights version 3" in before


@pytest.mark.parametrize("name", ["rollout_log_prob", "change", "loss", "difference"])
def test_4000_tokens_are_all_drawn_in_under_300_kb(name: str) -> None:
    page = response(4_000, annotated=True).strip(quantity=name).html
    assert len(chips(page)) == 4_000
    assert page.count("<td>") == 4_000
    assert len(page.encode()) < LIMIT


@pytest.mark.parametrize(
    "text", ["<b>&amp;", "日本語です", "\u202e" * 4, " " * 40, "x" * 100_000, "\n\n"]
)
def test_4000_tokens_of_any_text_stay_under_300_kb(text: str) -> None:
    made = sample([text] * 4_000, loss=[-1.2345e-05 * (i % 7) for i in range(4_000)])
    page = made.strip(quantity="loss").html
    assert len(chips(page)) == 4_000
    assert len(page.encode()) < LIMIT


def test_tokens_beyond_the_first_4000_are_drawn_when_asked_for() -> None:
    made = response(4_010, annotated=True)
    first, rest = made.strip(quantity="entropy"), made.strip(quantity="entropy", start=4_000)
    assert "sample.strip(&#34;entropy&#34;, start=4000)" in first.html
    assert [title.split(":")[0] for _, title, _ in chips(rest.html)] == [
        str(i) for i in range(4_000, 4_010)
    ]
    assert chips(made.strip(quantity="entropy", start=9_999).html) == []


def test_a_sample_of_any_length_stays_under_400_kb(html: Show) -> None:
    for tokens in (250, 1_000, 2_000, 4_000, 20_000):
        assert len(html(response(tokens, annotated=True)).encode()) < 400_000
