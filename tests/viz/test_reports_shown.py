"""What a person reads off the reports and the settings, in a notebook and in a terminal."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from kit import RLSession
from kit.config import LoraConfig, SessionConfig
from kit.reports import CurvePoint, SyncReport, TrainReport
from kit.reports.status import FirstPrompt
from kit.samples import Rollout
from kit.utils.display import Bundle, Shown, bundle
from kit.utils.formatting import data_size, duration, number
from kit.viz import render, show_report
from kit.viz.reports.evaluation import interval, right_and_wrong, wilson
from kit.viz.reports.training import phases
from kit.viz.reports.update import update_concerns
from kit.viz.theme import DARK, LIGHT
from tests.viz.comparisons import make_comparison
from tests.viz.conftest import Show
from tests.viz.results import (
    make_check,
    make_evaluation,
    make_mismatch,
    make_rollout,
    make_run,
    make_state,
    make_step,
    make_update,
)


def test_a_healthy_update_has_nothing_to_look_at(html: Show, plain: Show) -> None:
    report = make_update()
    assert update_concerns(report) == {}
    assert "to look at" not in html(report)
    assert "!" not in plain(report)
    assert "0 at the first optimizer step" in html(report)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("train/loss", math.nan),
        ("train/pg_loss", math.inf),
        ("train/grad_norm", 0.0),
        ("train/pg_clipfrac", 0.31),
        ("train/ppo_kl", -0.2),
        ("train/train_rollout_logprob_abs_diff", 0.2),
    ],
)
def test_a_metric_that_is_off_is_marked_and_explained(
    name: str, value: float, html: Show, plain: Show
) -> None:
    report = make_update(metrics={**make_update().metrics, name: value})
    assert list(update_concerns(report)) == [name]
    assert "! 1 metric to look at" in html(report)
    assert f"! {name}: " in plain(report)


def test_clipping_at_the_limit_is_not_off() -> None:
    assert update_concerns(make_update(metrics={"train/pg_clipfrac": 0.3})) == {}


def test_a_policy_that_moved_before_its_first_step_is_off() -> None:
    report = make_update(per_step=({"train/ppo_kl": 0.02}, {"train/ppo_kl": 0.01}))
    assert "first optimizer step" in update_concerns(report)["train/ppo_kl"]


def test_several_optimizer_steps_are_listed_one_by_one(html: Show) -> None:
    steps = tuple({"train/pg_loss": 0.25 * i} for i in range(1, 4))
    page = html(make_update(per_step=steps))
    assert "3 optimizer steps one by one" in page
    assert '<td class="kv-num">0.75</td>' in page
    assert "one by one" not in html(make_update())


def test_several_optimizer_steps_are_drawn_and_one_is_not(html: Show) -> None:
    steps = tuple({"train/loss": 0.5 - i, "train/grad_norm": math.nan} for i in range(3))
    page = html(make_update(per_step=steps))
    assert page.count("<svg") == 2
    assert "loss, by optimizer step: step 1: 0.5; step 2: -0.5; step 3: -1.5" in page
    assert ">0.5 to -1.5<" in page
    assert 'height="nan"' not in page
    assert "<svg" not in html(make_update())


def test_an_evaluation_of_several_responses_shows_how_many_of_each_prompt_are_right(
    html: Show,
) -> None:
    page = html(make_evaluation(size=4))
    assert page.count("<rect") == 5
    assert "prompts by how many of their 4 responses are right: 0: " in page
    assert "<rect" not in html(make_evaluation(size=1))


@pytest.mark.parametrize(("mean", "mark"), [(0.01, "✓"), (0.05, "!"), (0.2, "✗"), (math.nan, "✗")])
def test_a_mean_difference_is_marked_against_its_thresholds(
    mean: float, mark: str, html: Show
) -> None:
    page = html(make_mismatch(mean_abs_diff=mean))
    assert f'<td class="kv-fit">{mark}</td><td class="kv-name">mean |trainer' in page


def test_a_session_shows_where_it_stands_and_what_to_call(html: Show, plain: Show) -> None:
    page, words = html(make_state(host_memory=2_300_000_000)), plain(make_state())
    for shown in ("✓ running", "826 k", "cpu, float32", "3 of 60", "2.3 GB", "session.sync()"):
        assert shown in page
    assert "mean reward, 3 steps: 1: 0.25; 2: 0.5; 3: 0.75" in page
    assert "session.sync()  hand over" in words
    assert "off-policy" not in page


def test_a_fork_says_whose_it_is_and_a_session_which_forks_it_has(html: Show, plain: Show) -> None:
    for show in (html, plain):
        fork = show(make_state(name="b", fork_of="tiny-lora", forks=("a",)))
        assert "Fork b" in fork
        assert "fork of" in fork
        assert "tiny-lora" in fork
        assert "other forks" in fork
        root = show(make_state(forks=("a", "b")))
        assert "Session tiny" in root
        assert "a, b" in root
        assert "other forks" not in root


def test_an_engine_that_is_behind_is_told(html: Show, plain: Show) -> None:
    for shown in (html(make_state(engine_version=2)), plain(make_state(engine_version=2))):
        assert "trainer is at weights version 3, the engine at 2" in shown


def test_the_first_display_shows_the_first_prompt_as_tokens(html: Show, plain: Show) -> None:
    prompt = FirstPrompt((1, 5, 9), ("<|user|>", "1 +", "\n"), ("It is odd.",), ("It is long.",))
    first = make_state(step=0, first_prompt=prompt)
    page, words = html(first), plain(first)
    for text in ("&lt;|user|&gt;", "1␣+"):
        assert f"<i>{text}</i>" in page
    assert "prompt 1, as tokens: <|user|>|1␣+|" in words
    assert "! It is odd." in words
    assert "! 1 thing to look at in the prompts" in page
    assert "<li>It is odd.</li>" in page
    for shown in (page, words):
        assert "It is long." in shown
    later = make_state(step=3, first_prompt=prompt)
    for shown in (html(later), plain(later)):
        assert "It is odd." in shown
        assert "as tokens" not in shown
    assert "to look at" not in html(make_state(step=0, first_prompt=replace(prompt, warnings=())))
    long = make_state(step=0, first_prompt=FirstPrompt((1,) * 5000, ("ab",) * 5000))
    assert html(long).count("<i>ab</i>") == 160


def test_a_session_with_adapters_says_what_is_trained(html: Show, plain: Show) -> None:
    lora = LoraConfig(r=4, target_modules=("q_proj", "v_proj"), modules_to_save=("lm_head",))
    state = make_state(lora=lora, trained=8_192, parameters=819_200)
    for shown in (html(state), plain(state)):
        assert "LoRA, rank 4" in shown
        assert "adapters in q_proj, v_proj; whole lm_head" in shown
        assert "8.19 k (1.0%)" in shown
    assert "LoRA" not in plain(make_state())
    assert "LoRA, rank 4" in plain(make_state(lora=lora, parameters=None))  # before it starts


def test_a_session_that_was_not_started_says_how(html: Show, plain: Show) -> None:
    session = RLSession("tiny")
    assert "○ not started" in html(session)
    assert "session = RLSession.start(...)" in plain(session)


def test_a_repeated_update_says_that_nothing_was_done(html: Show, plain: Show) -> None:
    report = make_update(applied=False)
    assert "nothing was done again" in html(report)
    assert "nothing was done again" in plain(report)


def test_an_update_without_metrics_shows(html: Show, plain: Show) -> None:
    report = make_update(metrics={}, per_step=(), samples=0, tokens=0, seconds=0.0,
                         left_out=("prompt 1: failed",))  # fmt: skip
    assert "prompt 1: failed" in html(report)
    assert "0 samples" in plain(report)


def test_a_hand_over_is_one_line(plain: Show) -> None:
    report = SyncReport(weight_version=4, seconds=0.055, tensors=310, bytes=1_192_000_000)
    lost = replace(report, merge_error=0.614)
    assert "rounding takes 61% of the adapters' size" in plain(lost)
    assert "rounding" not in plain(report)
    assert plain(report) == (
        "Weights version 4 handed to the engine: 310 tensors, 1.2 GB in 55 ms (21.7 GB/s)"
    )


@pytest.mark.parametrize(
    ("verdict", "words"), [("pass", "✓ pass"), ("warn", "! warn"), ("fail", "✗ fail")]
)
def test_a_verdict_is_a_word_and_a_sign(verdict: str, words: str, html: Show, plain: Show) -> None:
    report = make_mismatch(verdict=verdict)
    assert f"{words}</span>" in html(report)
    assert words in plain(report)


def test_a_mismatch_shows_thresholds_cause_and_worst_tokens(html: Show) -> None:
    page = html(make_mismatch())
    for shown in (">0.034<", ">0.02<", ">0.1<", ">0.81<", ">+0.81<", ">-0.41<", "␣therefore"):
        assert shown in page
    for shown in ("Generate again.", "written by weights version 2, trainer at version 3"):
        assert shown in page


def test_a_mismatch_shows_its_kind_evidence_quantiles_and_curves(html: Show, plain: Show) -> None:
    page, words = html(make_mismatch()), plain(make_mismatch())
    for shown in ("stale weights.", "rollout 2, engine 2", "99.9%", ">0.31<", ">2.25<", ">94.0%<"):
        assert shown in page
    assert page.count("<svg") == 2
    assert page.count("<rect") == 12 + 2
    assert "weight versions: rollout 2, engine 2, trainer 3" in words
    assert "by position, 0 to 11: ▁▂▃▃▄▅▅▆▇▇██ (up to 0.12)" in words
    assert "KL k1 -0.0004" in words or "KL k1 -4.0e-04" in words


def test_a_caret_stands_under_the_token_that_differs(html: Show, plain: Show) -> None:
    lines = plain(make_mismatch()).splitlines()
    place = next(i for i, line in enumerate(lines) if "12+35=47<|end|>" in line)
    assert lines[place].index("7<|end|>") == lines[place + 1].index("^")
    assert "12+35=47&lt;|end|&gt;\n       ^</pre>" in html(make_mismatch())


def test_a_curve_with_a_point_that_is_no_number_is_drawn_without_it(html: Show) -> None:
    points = (CurvePoint(0, 0, math.nan, 1), CurvePoint(1, 1, 0.5, 3))
    page = html(make_mismatch(by_position=points, by_probability=()))
    assert "place 0: NaN; place 1: 0.5" in page
    assert 'height="nan"' not in page


def test_a_check_marks_what_holds_what_does_not_and_what_was_not_looked_at(
    html: Show, plain: Show
) -> None:
    page, words = html(make_check()), plain(make_check())
    for shown in ("1 of 2 invariants hold", "not looked at: sync first", "0 within 1e-09"):
        assert shown in page
        assert shown in words
    marks = [line.split()[0] for line in words.splitlines()[1:]]
    assert marks == ["✓", "✗", "–"]


def test_the_wilson_interval_agrees_with_published_values() -> None:
    # R: prop.test(x, n, correct = FALSE)$conf.int
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
    assert wilson(1.0, 20) == pytest.approx((0.8389, 1.0), abs=1e-4)
    assert all(math.isnan(bound) for bound in wilson(math.nan, 0))


def test_an_evaluation_shows_accuracy_with_its_interval(html: Show, plain: Show) -> None:
    report = make_evaluation(right=0.6)
    low, high = wilson(report.mean_reward, 64)
    words = f"{report.mean_reward:.1%} (95% interval {low:.1%} to {high:.1%})"
    assert words in html(report)
    assert words in plain(report)


def test_graded_rewards_have_no_interval_of_a_proportion(plain: Show) -> None:
    rollout = Rollout([s.with_reward(0.3) for s in make_rollout(2)])
    report = replace(make_evaluation(), rollout=rollout, mean_reward=0.3)
    assert interval(report) is None
    assert "mean reward 0.3" in plain(report)


def test_graded_rewards_have_no_right_and_wrong_but_a_least_and_a_most(
    html: Show, plain: Show
) -> None:
    report = make_evaluation()
    weighted = [
        replace(s, reward=1.1 * s.reward + 0.1 * (i % 3))  # type: ignore[operator]
        for i, s in enumerate(report.rollout)
    ]
    graded = replace(report, rollout=report.rollout.with_samples(weighted))
    page, words = html(graded), plain(graded)
    assert "the 4 prompts of least reward" in page
    assert page.index("of least reward") < page.index("the 4 prompts of most reward")
    assert "not right" not in page
    for sign in "✗✓":
        assert sign not in page + words
    assert words.count("▼") == words.count("▲") == 3
    one = replace(graded, rollout=graded.rollout.with_samples(weighted[:1]))
    assert "the 1 prompt of least reward" in html(one)
    assert "of most reward" not in html(one)


def test_an_evaluation_lists_pass_at_k_and_both_kinds_of_prompts(html: Show, plain: Show) -> None:
    report = make_evaluation(size=4)
    page = html(report)
    assert "pass@1 55.0%   pass@2 70.0%   pass@4 82.0%" in plain(report)
    right, wrong = right_and_wrong(report.rollout)
    assert len(right) + len(wrong) == 64
    assert f"✗ not always right: {len(wrong)} prompts, the first 4 shown" in page
    assert f"✓ right every time: {len(right)} prompts, the first 4 shown" in page
    assert "the true interval is wider" in page


def test_an_evaluation_of_nothing_shows(html: Show, plain: Show) -> None:
    report = replace(make_evaluation(), rollout=Rollout([]), mean_reward=math.nan, prompts=0)
    assert "mean reward NaN" in plain(report)
    assert "<details" not in html(report)


def test_the_phases_of_a_step_add_up_to_the_whole() -> None:
    parts = phases(make_step())
    assert [name for name, _ in parts] == [
        "generate", "train", "hand over weights", "everything else",
    ]  # fmt: skip
    assert sum(seconds for _, seconds in parts) == pytest.approx(2.8)


def test_the_phases_of_a_step_without_timings_come_from_its_results() -> None:
    parts = dict(phases(replace(make_step(), metrics={})))
    assert parts == {"generate": 1.6, "train": 0.9, "hand over weights": 0.055}


def test_a_step_shows_headlines_phases_and_verdict(html: Show, plain: Show) -> None:
    step = make_step(evaluated=True)
    page = html(step)
    for shown in ("generate 1.6 s (57.1%)", "! warn", "addition (evaluation)", "The update"):
        assert shown in page
    assert "train 900 ms" in plain(step)


def test_a_step_of_missing_and_broken_metrics_shows(html: Show, plain: Show) -> None:
    step = replace(
        make_step(), mismatch=None, rollout=Rollout([]),
        metrics={"rollout/raw_reward": math.nan, "perf/rollout_time": math.nan},
    )  # fmt: skip
    assert "reward NaN" in plain(step)
    assert "rollout/raw_reward" in html(step)


def test_a_run_compares_its_first_tenth_with_its_last(plain: Show) -> None:
    history = tuple({"rollout/raw_reward": float(i)} for i in range(20))
    report = TrainReport(steps=(replace(make_step(), step=19),), history=history)
    line = next(x for x in plain(report).splitlines() if "raw_reward" in x)
    assert line.split() == ["rollout/raw_reward", "0.5", "18.5", "+18"]
    assert "first 2 steps" in plain(report)


def test_a_run_that_stopped_early_says_why(html: Show, plain: Show) -> None:
    report = replace(make_run(12), stopped="interrupted in step 12")
    assert "! stopped early: interrupted in step 12" in html(report)
    assert "! stopped early: interrupted in step 12" in plain(report)


def test_a_run_without_steps_shows(html: Show, plain: Show) -> None:
    assert "no steps yet" in html(TrainReport())
    assert "no steps yet" in plain(TrainReport())


def test_settings_show_what_was_changed_and_what_each_does(html: Show, plain: Show) -> None:
    config = SessionConfig.preset("tiny").replace("training.learning_rate", 3e-4)
    page = html(config)
    assert "Settings of tiny: 3 settings changed" in page
    top, *folded = page.split("<details")
    assert "training.learning_rate" in top
    assert "training.num_rollout" not in top
    assert "default 1e-06" in top
    assert any("1 of" in part and "● changed; default 1e-06" in part for part in folded)
    assert "open=" not in "".join(part.split(">")[0] for part in folded)
    assert '<span class="kv-text">RLSession.attach</span>' in top
    assert "Prompts a step." in page
    assert plain(config) == config.to_yaml()


def test_a_comparison_is_shown_though_only_groups_beyond_the_page_kept_samples(html: Show) -> None:
    three = make_comparison()
    late = tuple((*[None] * 6, *row) for row in three.samples)
    page = html(replace(three, groups=three.groups * 3, differences=(), samples=late))
    assert "Curves" in page
    assert "The same prompts" in html(three)
    assert "The same prompts" not in page


def test_a_thing_that_is_no_report_is_refused() -> None:
    with pytest.raises(TypeError, match="no display for dict"):
        show_report({})  # type: ignore[arg-type]


class Verdict(Shown):
    """A kind of result that the kit does not know."""


def test_another_package_adds_the_display_of_its_own_kind_of_result() -> None:
    @render.register(Verdict)
    def show_verdict(verdict: Verdict) -> Bundle:
        return bundle("<b>guilty</b>", "guilty")

    assert Verdict()._repr_mimebundle_() == bundle("<b>guilty</b>", "guilty")
    assert str(Verdict()) == "guilty"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.5312345, "0.5312"), (12345, "12,345"), (0.000012, "1.2e-05"), (math.nan, "NaN"),
     (-math.inf, "-inf"), (-0.0, "0"), (None, "–"), (3.0, "3"), (9999.7, "10,000"),
     (1e20, "1e+20")],
)  # fmt: skip
def test_numbers_read_well(value: float | None, shown: str) -> None:
    assert number(value) == shown


def test_fewer_digits_bring_no_power_of_ten() -> None:
    assert [number(x, 3) for x in (999.6, 123.4, 0.12345)] == ["1,000", "123", "0.123"]


def test_times_and_sizes_read_well() -> None:
    assert [duration(s) for s in (0.0351, 1.25, 200.0, 7500.0)] == [
        "35 ms", "1.2 s", "3 min 20 s", "2 h 5 min",
    ]  # fmt: skip
    assert [data_size(s) for s in (512, 3.2e6, 1.2e9)] == ["512 B", "3.2 MB", "1.2 GB"]


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2 defines it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_words_are_legible_on_every_background(palette: dict[str, str]) -> None:
    strong = ("p1", "p2", "p3", "p4", "u1", "u2", "u3", "d1", "d2", "d3")
    for back in ("bg", "soft", *strong):
        assert contrast(palette["fg"], palette[back]) >= 4.5, back
    for back in ("bg", "soft"):
        assert contrast(palette["muted"], palette[back]) >= 4.5, back
    for mark in ("up", "down", "curve", "point"):
        assert contrast(palette[mark], palette["bg"]) >= 3, mark


def test_printing_a_report_gives_its_plain_text(plain: Show) -> None:
    for report in (make_update(), make_mismatch(), make_evaluation(), make_run(3)):
        assert str(report) == plain(report)
