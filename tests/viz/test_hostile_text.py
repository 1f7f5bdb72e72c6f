"""Nothing that a model, a data set or a reward function wrote can leave its place on the page."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.config import SessionConfig
from kit.doctor import Diagnosis, Finding
from kit.reports import Invariant, SyncReport, TokenDifference, TrainReport
from kit.reports.status import FirstPrompt, SettingsChange, Snapshot, Snapshots
from kit.samples import Batch, Rollout, Sample, Status
from kit.utils.formatting import cut, visible
from kit.viz import compare_samples, curves
from tests.cases import slow
from tests.viz.comparisons import make_comparison
from tests.viz.conftest import Show
from tests.viz.results import (
    make_batch,
    make_check,
    make_evaluation,
    make_memory_plan,
    make_mismatch,
    make_rollout,
    make_run,
    make_sessions,
    make_state,
    make_status,
    make_step,
    make_update,
)
from tests.viz.what_ifs import make_what_if

HOSTILE = (
    "<script>alert(1)</script>",
    "</script></style></pre></details><h1>out</h1>",
    '"><img src=x onerror=alert(1)>',
    "<a href='javascript:alert(1)'>x</a><iframe></iframe>",
    "\x1b[31mred\x1b[0m\x1b]0;title\x07\x9b31m",
    "\u202egnp.exe\u202c\u2066\u200b\ufeff",
    "null\x00byte\x7f\r\b",
    "half \ud800 pair \udfff \ufffe",
    "{{ 7 * 7 }} {% raw %} $\\bad$ %s {0}",
    "--></table></div>" + "x" * 100_000,
    "<" * 5_000 + "&" * 5_000,
    r"$$\href{javascript:alert(1)}{x}$$ \(y\) \begin{align}a\end{align} ![i](//example.com/i.png)",
    "</style><style>*{display:none!important}</style><link rel=stylesheet href=//x.example><!--",
    "<svg onload=alert(1)><style>@import '//example.com/x';</style><math><img src=//example.com/i>",
)
DISPLAY = {"div", "style", "b", "span", "table", "thead", "tbody", "tr", "th", "td", "details"}
DISPLAY |= {"summary", "pre", "i", "u", "ul", "li", "br"}
DRAWING = {"svg", "g", "path", "text", "defs", "use", "clippath", "rect"}
TAGS = DISPLAY | DRAWING


class Outline(HTMLParser):
    """Which tags and attributes a browser would find."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.links: set[str] = set()
        self.depth = 0
        self.lowest = 0
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links |= {value or "" for name, value in attrs if name.endswith(("href", "src"))}
        self.depth += tag != "br"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= 1
        self.lowest = min(self.lowest, self.depth)


def assert_harmless(page: str) -> None:
    seen = Outline(page)
    assert seen.tags <= TAGS, seen.tags - TAGS
    assert not [name for name in seen.attributes if name.startswith("on")]
    assert all(link.startswith("#") for link in seen.links)
    assert (seen.depth, seen.lowest) == (0, 0), "a tag was closed or left open from inside"
    assert_visible(page)


def assert_visible(text: str) -> None:
    assert not re.search(
        "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u202a-\u202e\u2066-\u2069]", text
    )
    text.encode("utf-8")


def poisoned(text: str) -> list[object]:
    """Every kind of result, with the text in every field that takes text."""
    sample = Sample(
        prompt=text, response=text, response_length=3, tokens=[1, 2, 3], label=text, reward=1.0,
        error=text, status=Status.COMPLETED, metadata={"token_texts": [text] * 3},
        rollout_log_probs=[-0.1] * 3, annotated_versions=[0, 1], token_values={
            "trainer_log_prob": [-0.1, -0.2, -3.0], "trainer_log_prob_before": [-0.2, -0.1, -9.0],
            text: [1.0, -1.0, 0.0],
        },
    )  # fmt: skip
    chat = replace(sample, prompt=[{"role": text, "content": text}], label=None, index=1)
    rollout = Rollout([sample, chat, replace(chat, label=text)])
    metrics = {text: 1.0, "eval/" + text: 0.5, "train/grad_norm": 0.0}
    update = make_update(metrics=metrics, per_step=(metrics, metrics), left_out=(text,))
    worst = TokenDifference(0, 0, text, -1.0, -2.0, before=text, after=text)
    mismatch = make_mismatch(cause=text, evidence=(text, text), worst=(worst,))
    checked = make_check(mismatch=mismatch, invariants=(Invariant(text, 1.0, "0", False, text),))
    evaluation = replace(make_evaluation(), dataset=text, rollout=rollout, mean_reward=1.0)
    step = replace(
        make_step(), rollout=rollout, update=update, mismatch=mismatch, evaluation=evaluation,
        metrics=metrics,
    )  # fmt: skip
    status = make_status(last=step, history=(metrics,), error=text, stopped=text)
    run = TrainReport((step,), (evaluation,), 1.0, text, ({**metrics, "rollout/raw_reward": 0.5},))
    diagnosis = Diagnosis(text, text, (Finding(text, "problem", text, text, (text,)),), 1.0)
    kept = Snapshot("a", 1, 1, 0.5, 8, 0.0, Path(text.replace("\0", "")))
    config = SessionConfig(name=text[:50].replace("\ud800", "?").replace("\udfff", "?"))
    return [
        sample, chat, rollout, Batch((sample, chat), (1.0, -1.0), left_out=(text,)), update,
        mismatch, checked, evaluation, step, run, config, curves(run), curves(run, [text]),
        compare_samples(rollout, rollout), sample.strip(quantity=text), sample.strip("change"),
        status, diagnosis, make_memory_plan(name=text), make_sessions(text, text),
        make_state(step=0, first_prompt=FirstPrompt((1,) * 90, (text,) * 90, (text,), (text,))),
        make_state(fork_of=text, forks=(text, text)),
        Snapshots((kept,), 1), kept, make_what_if(label=text, refused=text),
        make_comparison(text, sample), SettingsChange(1, ((text, text, None),)),
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [HOSTILE[1], *slow(HOSTILE[0], *HOSTILE[2:])],
    ids=lambda text: ascii(text[:16]),
)
def test_no_display_lets_text_out_of_its_place(text: str, html: Show, plain: Show) -> None:
    for result in poisoned(text):
        page = html(result)
        assert_harmless(page)
        assert len(page) < 500_000
        assert_visible(plain(result))
        assert len(plain(result)) < 10_000


@given(st.text(st.characters(exclude_categories=())))
def test_visible_text_encodes_and_stays_as_it_is(text: str) -> None:
    shown = visible(text)
    assert_visible(shown)
    assert visible(shown) == shown


@given(st.text(st.characters(exclude_categories=())), st.integers(0, 200))
def test_cut_text_is_a_start_that_fits(text: str, limit: int) -> None:
    from html import escape

    shown, missing = cut(text, limit)
    assert shown == visible(text[: len(text) - missing])
    # html.escape writes one byte more for each quote than the kit does.
    assert len(escape(shown, quote=False).encode()) <= limit


@pytest.mark.parametrize(
    ("hidden", "shown"),
    [("\x00", "␀"), ("\x1b[31m", "␛[31m"), ("\u202e", "⟨U+202E⟩"), ("\ud800", "⟨U+D800⟩"),
     ("\r", "␍"), ("\u00a0", "⟨U+00A0⟩"), ("\u200b", "⟨U+200B⟩"), ("a\n\tb", "a\n\tb"),
     ("日本\u3000語 é", "日本\u3000語 é")],
)  # fmt: skip
def test_hidden_characters_are_written_out(hidden: str, shown: str) -> None:
    assert visible(hidden) == shown


def test_a_script_is_shown_as_the_words_it_is(html: Show) -> None:
    page = html(Sample(response="<script>alert(1)</script>", response_length=1, tokens=[1]))
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script" not in page


def test_no_display_names_an_address_or_a_script(html: Show) -> None:
    rollout = make_rollout()
    results = [
        rollout, rollout[0], make_batch(), make_update(), make_mismatch(), make_check(),
        make_evaluation(),
        make_step(evaluated=True), make_run(), SessionConfig.preset("tiny"), curves(make_run()),
        compare_samples(rollout, rollout), SyncReport(1, 0.1, 3, 1000), make_memory_plan(),
    ]  # fmt: skip
    for result in results:
        page = html(result)
        assert_harmless(page)
        assert "http" not in page
        assert "url(" not in page.replace("url(#", "")
        assert "@import" not in page


@pytest.mark.parametrize(
    "text",
    ["word " * 1000, "<b>&" * 1250, "日本語\u202e" * 1250, "\x00" * 5000],
    ids=["words", "markup", "marks", "nulls"],
)
@pytest.mark.parametrize("size", [8, *slow(1, 512)])
def test_512_samples_of_1000_tokens_stay_under_a_megabyte(text: str, size: int, html: Show) -> None:
    samples = [
        Sample(
            group_index=i // size, index=i, response=text, response_length=1000, error=text,
            label=f"{i} {text}", reward=float(i % 2), status=Status.TRUNCATED,
            prompt=[{"role": text, "content": text}] * 5,
        )
        for i in range(512)
    ]  # fmt: skip
    assert len(html(Rollout(samples)).encode()) < 1_000_000
    assert len(html(Batch(tuple(samples), (0.5,) * 512)).encode()) < 1_000_000


def test_samples_that_are_not_shown_are_counted(html: Show) -> None:
    samples = [Sample(group_index=i // 2, index=i, response=f"<{i}>") for i in range(4096)]
    page = html(Rollout(samples))
    assert len(page.encode()) < 1_000_000
    assert "3,584 more samples not shown here: rollout[512:] shows them" in page
    assert "&lt;511&gt;" in page
    assert "&lt;512&gt;" not in page


def test_what_is_cut_is_counted(html: Show) -> None:
    samples = [Sample(response="x" * 100_000, response_length=20_000)] * 2
    assert "… 96,000 more characters not shown here" in html(Rollout(samples))


def test_a_long_strip_of_tokens_is_cut_and_counted(html: Show) -> None:
    sample = Sample(response="é", response_length=5000, tokens=list(range(5000)),
                    rollout_log_probs=[-1.0] * 5000)  # fmt: skip
    page = html(sample)
    call = "sample.strip(&#34;rollout_log_prob&#34;, start=4000)"
    assert f"… 1,000 more tokens not shown here: {call}" in page
    assert page.count('<i class="p2" title="') == 4_000
    rest = sample.strip(quantity="rollout_log_prob", start=4000).html
    assert rest.count('<i class="p2" title="4') == 1_000


def test_no_display_shows_its_own_markup_as_words() -> None:
    """As it would if a piece of it were escaped along with a text."""
    from tests.browser.displays import DISPLAYS, bundle

    assert "progress" in DISPLAYS
    for name in DISPLAYS:
        html = bundle(name)["text/html"]
        assert not re.search(r"&lt;(div|span|progress|table|details|p|ul|svg)\b", html), name
