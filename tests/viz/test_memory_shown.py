"""What a person reads off a memory plan, in a notebook and in a terminal."""

from __future__ import annotations

import re

import pytest

from kit.memory import MemoryPlan
from kit.viz.reports.memory import decisions
from tests.viz.conftest import Show
from tests.viz.results import make_host_plan, make_memory_plan

SEEN = {"generate": 20 * 2**30, "update": 24 * 2**30}


def widths(page: str) -> list[float]:
    return [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', page)]


def test_the_title_says_how_much_of_what_is_taken(html: Show, plain: Show) -> None:
    words = "Memory plan for a card of 24 GiB: at most 23.0 GiB of 24.0 GiB"
    plan = make_memory_plan()
    assert words in html(plan)
    assert plain(plan).startswith(words)
    less = make_memory_plan(80, limit=24 * 2**30)
    assert "of 24.0 GiB (memory.device_gib; the device has 80.0 GiB)" in plain(less)


@pytest.mark.parametrize(
    "plan", [make_memory_plan(), make_memory_plan(offloaded=True), make_host_plan()]
)
def test_bars_are_as_long_as_what_they_stand_for(plan: MemoryPlan, html: Show) -> None:
    parts = sorted(size for phase in plan.phases for _, size in phase.parts if size)
    drawn = sorted(widths(html(plan)))
    for size, width in zip(parts, drawn, strict=True):
        assert width / drawn[-1] == pytest.approx(size / parts[-1], abs=0.01)


def test_the_limit_is_a_line_where_it_is_near_and_words_where_it_is_far(
    html: Show, plain: Show
) -> None:
    assert "stroke-dasharray" in html(make_memory_plan())
    assert "|" in plain(make_memory_plan())
    far = html(make_host_plan())
    assert "stroke-dasharray" not in far
    assert "the limit of 16.0 GiB is far to the right" in far


def test_each_part_of_each_phase_is_in_the_table_and_what_sleeps_says_so(plain: Show) -> None:
    words = plain(make_memory_plan(deep=True))
    assert re.search(r"\d engine: KV cache +13\.0 GiB +asleep +asleep", words)
    assert re.search(r"trainer: weights, optimizer +asleep +6\.7 GiB +6\.7 GiB", words)
    assert re.search(r"trainer: activations, logits +– +9\.1 GiB +–", words)
    offloaded = plain(make_memory_plan(offloaded=True))
    assert re.search(r"trainer: weights, optimizer +in host memory +in host", offloaded)


def test_what_was_measured_is_marked_with_how_far_the_plan_is_off(html: Show, plain: Show) -> None:
    plan = make_memory_plan().with_measured(SEEN)
    words = plain(plan)
    assert "23.0 GiB, measured 20.0 GiB (plan 15.0% above)" in words
    assert re.search(r"the plan is +15\.0% above +10\.0% below +–", words)
    assert re.search(r"measured +20\.0 GiB +24\.0 GiB +not yet", words)
    page = html(plan)
    assert "▲ measured" in page
    assert page.count("l5 8h-10z") == 2
    assert "▲ measured" not in html(make_memory_plan())


def test_a_measurement_above_the_limit_stays_in_the_picture(html: Show) -> None:
    page = html(make_memory_plan().with_measured({"generate": 40 * 2**30}))
    tips = [float(x) for x in re.findall(r"M([\d.]+) [\d.]+l5 8h-10z", page)]
    assert all(x < 760 for x in tips)


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (make_memory_plan(), "KV cache sleeps: awake, engine and trainer would hold 35.4 GiB"),
        (make_memory_plan(deep=True), "KV cache and weights sleep: "),
        (make_memory_plan(20, deep=True), "6.7 GiB wait in host memory: beside it the KV cache"),
        (make_memory_plan(80, deep=True), "memory.sleep: always asks for it"),
        (make_memory_plan(80, kv_sleeps=False), "Nothing sleeps: engine and trainer fit side by"),
        (make_memory_plan(offloaded=True), "stay in host memory, and it steps there"),
        (make_memory_plan(), "79 of the 128 samples of a rollout at once"),
        (make_memory_plan(kv_tokens=128 * 1536), "all 128 samples of a rollout at once"),
        (make_memory_plan(), "recomputes nothing"),
        (make_memory_plan(recompute="selective"), "recomputes the feed-forward part of each layer"),
        (make_memory_plan(), "Its layers are compiled"),
        (make_host_plan(), "This is host memory, not a GPU's"),
        (make_host_plan(), "Its layers are not compiled"),
    ],
)
def test_every_decision_is_said_with_its_reason(
    plan: MemoryPlan, says: str, html: Show, plain: Show
) -> None:
    assert any(says in words for words in decisions(plan))
    assert says in plain(plan)
    assert says.replace("'", "&#39;") in html(plan)


def test_every_sentence_names_a_setting_that_exists() -> None:
    from kit.config import SessionConfig

    config = SessionConfig()
    plans = [make_memory_plan(deep=True), make_memory_plan(offloaded=True, kv_sleeps=False)]
    for plan in plans:
        for words in decisions(plan):
            section, name = re.findall(r"([a-z]+)\.([a-z_]+)", words)[-1]
            assert name in type(getattr(config, section)).model_fields
