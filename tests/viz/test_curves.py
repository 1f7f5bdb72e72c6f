"""Curves: the right points, in a notebook, a file and a terminal."""

from __future__ import annotations

import base64
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from kit.reports import TrainReport
from kit.viz import curves, save_curve, terminal_curve
from kit.viz.curves import curve, evaluations_of, rows_of, smooth
from kit.viz.plots import curves_svg
from kit.viz.svg import panels
from tests.viz.results import make_evaluation, make_run, make_step

PNG = b"\x89PNG\r\n\x1a\n"


def test_curves_come_as_page_words_and_image() -> None:
    bundle = curves(make_run())._repr_mimebundle_()
    assert set(bundle) == {"text/html", "text/plain", "image/png"}
    assert base64.b64decode(bundle["image/png"]).startswith(PNG)
    assert "rollout/raw_reward: 0.1783 at step 0" in bundle["text/plain"]
    assert bundle["text/html"].count("<svg") == 4, "a drawing for each curve"


def test_the_drawing_takes_the_colours_of_the_page() -> None:
    drawing = curves(make_run()).html.split("<svg")[1].split("</svg>")[0]
    assert "var(--kv-curve)" in drawing
    assert "var(--kv-fg)" in drawing
    assert "<style" not in drawing


def test_drawings_on_one_page_share_no_id() -> None:
    one, other = curves(make_run(20)).html, curves(make_run(30)).html
    ids = [set(re.findall(r' id="([^"]+)"', page)) for page in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_the_same_run_is_drawn_the_same() -> None:
    assert curves(make_run(12)).html == curves(make_run(12)).html


def test_a_metric_that_was_not_logged_is_named() -> None:
    shown = curves(make_run(), names=("rollout/raw_reward", "train/kl_loss"))
    assert "Not logged: train/kl_loss." in shown.html
    assert "train/kl_loss: not logged" in shown.plain


def test_steps_without_a_finite_value_are_counted() -> None:
    rows = tuple({"train/grad_norm": v} for v in (1.0, math.nan, 2.0, math.inf))
    shown = curves(TrainReport(history=rows), names=("train/grad_norm",))
    assert "! train/grad_norm: 2 steps without a finite value" in shown.html
    assert curve(rows, "train/grad_norm").points == [(0.0, 1.0), (2.0, 2.0)]


def test_a_run_of_nothing_has_no_image() -> None:
    bundle = curves(TrainReport())._repr_mimebundle_()
    assert "image/png" not in bundle
    assert "<svg" not in bundle["text/html"]
    assert "not logged" in bundle["text/plain"]


def test_history_is_numbered_back_from_the_last_step() -> None:
    history = tuple({"rollout/raw_reward": float(i)} for i in range(5))
    report = TrainReport(steps=(replace(make_step(), step=5),), history=history)
    assert [row["step"] for row in rows_of(report)] == [1, 2, 3, 4, 5]


def test_rows_that_know_their_step_keep_it() -> None:
    report = TrainReport(history=({"step": 10.0, "a": 1.0}, {"step": 20.0, "a": 2.0}))
    assert curve(rows_of(report), "a").points == [(10.0, 1.0), (20.0, 2.0)]


def test_an_evaluation_that_is_reported_twice_is_drawn_once() -> None:
    evaluation = make_evaluation(step=3)
    report = TrainReport(steps=(replace(make_step(), evaluation=evaluation),),
                         evaluations=(evaluation,))  # fmt: skip
    assert evaluations_of(report) == {"eval/addition": [(3.0, evaluation.mean_reward)]}


def test_several_held_out_sets_are_told_apart_by_mark_colour_and_name() -> None:
    small = make_evaluation(step=3)
    evaluated = replace(small, others=(replace(small, dataset="large", mean_reward=0.25),))
    step = replace(make_step(), evaluation=evaluated)
    report = TrainReport(steps=(step,), history=(step.metrics,), evaluations=(evaluated,))
    drawn = [curve(rows_of(report), "rollout/raw_reward")]
    drawn = [replace(drawn[0], evaluations=evaluations_of(report))]
    for html in (str(panels(drawn)), str(curves_svg(drawn))):
        assert "var(--kv-point)" in html
        assert "var(--kv-s3)" in html
    assert "◆ eval/addition" in str(panels(drawn))
    assert "■ eval/large 0.25" in str(panels(drawn))
    shown = report._repr_mimebundle_()["text/html"]
    number = f"{small.mean_reward:.1%}"
    assert f"Last evaluation: addition {number}, large" in shown


def test_a_running_mean_uses_only_what_came_before() -> None:
    points = [(0.0, 1.0), (1.0, 3.0), (2.0, 5.0), (3.0, 100.0)]
    assert smooth(points, 2) == [(0.0, 1.0), (1.0, 2.0), (2.0, 4.0), (3.0, 52.5)]


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": i, "rollout/raw_reward": i / 50} for i in range(50)],
        [{"rollout/raw_reward": 0.5}, {"eval/$\\bad$ 数学": 0.4}],
        [{"rollout/raw_reward": math.nan}],
        [{"step": 3, "eval/only": 0.5}],
        [],
    ],
    ids=["run", "odd name", "nan", "evaluation only", "empty"],
)
def test_a_curve_is_saved_whatever_the_rows(rows: list[dict[str, float]], tmp_path: Path) -> None:
    path = save_curve(rows, tmp_path / "made" / "curve.png", heading="a $run$")
    assert path.read_bytes().startswith(PNG)


def test_drawing_leaves_the_plots_of_a_notebook_alone() -> None:
    code = (
        "import sys, kit.viz; assert not {'matplotlib', 'plotext', 'pandas'} & set(sys.modules);"
        "from kit.viz import save_curve; save_curve([{'rollout/raw_reward': 1}], sys.argv[1]);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    command = [sys.executable, "-c", code, "/dev/null"]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0


def test_a_terminal_curve_fits_its_size_and_names_its_ends() -> None:
    lines = terminal_curve([0.1, 0.4, 0.9], title="reward", width=40, height=8).splitlines()
    assert len(lines) == 8
    assert all(len(line) <= 40 for line in lines)
    assert lines[0] == "reward"
    assert lines[2].startswith("0.9")
    assert any(line.startswith("0.1") for line in lines)
    assert lines[-1].split() == ["0", "1", "2"]


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.5] * 3, [0.0, 0.0], [math.nan, 0.2, math.inf, 0.4], [1e-12, 1e-12], [-5.0, 5.0],
     list(range(3000)), [1e29, -1e29]],
    ids=["one", "flat", "zero", "gaps", "small", "signs", "many", "large"],
)  # fmt: skip
def test_a_terminal_curve_draws_any_numbers(values: list[float]) -> None:
    drawn = terminal_curve(values, width=50, height=8)
    assert len(drawn.splitlines()) == 8
    assert any("\u2801" <= letter <= "\u28ff" for letter in drawn), "no point was drawn"
    assert "\x1b" not in drawn


@pytest.mark.parametrize("values", [[], [math.nan], [1e308, -1e308]])
def test_a_terminal_curve_of_nothing_says_so(values: list[float]) -> None:
    assert terminal_curve(values, title="re\x1bward") == "re␛ward: no values"
