"""The dashboard: what it says of a training, and that its buttons do what they say."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from kit.checkpoint.state import TrainState
from kit.config import SessionConfig
from kit.lifecycle.lock import SessionLock
from kit.lifecycle.step import Tracker
from kit.lifecycle.train_loop import Training
from kit.reports import StepReport, TrainingStatus
from kit.viz.curves import curve, smooth
from kit.viz.html import part
from kit.viz.live.widgets import Dashboard
from kit.viz.svg import MOST_POINTS, panels
from tests.viz.conftest import Show
from tests.viz.results import make_metrics, make_status, make_step

PATIENCE = 60.0


class Steps:
    """As much of a session as a training needs, with steps made by hand."""

    def __init__(self) -> None:
        self.lock = SessionLock()
        self.tracker = Tracker()
        self.state = TrainState(SessionConfig())
        self.may = threading.Semaphore(0)

    def end_training(self) -> None:
        pass

    def step(self) -> StepReport:
        assert self.may.acquire(timeout=PATIENCE)
        report = make_step(self.state.step)
        self.state.history.append(report.metrics)
        self.state.step += 1
        self.state.last_step = report
        return report


@pytest.fixture
def steps() -> Steps:
    return Steps()


def make_dashboard(steps: Steps, total: int = 5) -> Dashboard:
    return Dashboard(Training(steps, lambda: steps.step(), total))  # type: ignore[arg-type]


def await_value(widget: Any, name: str, holds: Callable[[Any], bool]) -> None:
    """Return when a widget's trait is as it should be."""
    right = threading.Event()

    def look(_: object = None) -> None:
        if holds(getattr(widget, name)):
            right.set()

    widget.observe(look, name)
    look()
    assert right.wait(PATIENCE), getattr(widget, name)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"state": "ready", "done": 0}, "Not begun"),
        ({"state": "running"}, "Running"),
        ({"asked": "pause"}, "Pausing after this step"),
        ({"asked": "stop"}, "Stopping after this step"),
        ({"state": "paused"}, "Paused"),
        ({"state": "paused", "asked": "run"}, "Goes on when the session is free"),
        ({"state": "stopped", "stopped": "stopped by hand"}, "stopped by hand"),
        ({"state": "finished"}, "Finished"),
        ({"state": "failed", "error": "RewardError: boom"}, "RewardError: boom"),
    ],
)
def test_the_state_is_in_words(changes: dict[str, Any], says: str, html: Show, plain: Show) -> None:
    status = make_status(**changes)
    assert says in html(status)
    assert says in plain(status)


def test_progress_says_how_far_and_how_long(html: Show) -> None:
    shown = html(make_status(done=40, total=100, step_seconds=0.5))
    assert "40 of 100 steps" in shown
    assert "about 30.0 s left" in shown
    assert 'role="progressbar"' in shown
    assert 'aria-valuenow="40"' in shown


def test_a_training_without_steps_can_be_shown(html: Show) -> None:
    shown = html(TrainingStatus("ready", 10))
    assert "0 of 10 steps" in shown
    assert "nothing yet" in shown


def test_every_measure_has_a_panel_with_words(html: Show) -> None:
    shown = html(make_status())
    for words in ("reward", "response length", "entropy", "KL", "log-prob", "gradient norm"):
        assert re.search(f'kv-panel-head"><span title="[^"]*">[^<]*{words}', shown), words
    assert len(re.findall(r'role="img" aria-label="[^"]+" class="kv-drawing"', shown)) == 6


def test_the_reference_takes_the_place_of_the_rollout_policy_where_there_is_one(html: Show) -> None:
    rows = tuple({**make_metrics(s), "train/kl_loss": 0.01 * s} for s in range(4))
    shown = html(make_status(history=rows))
    assert "KL to the reference" in shown
    assert "KL to the rollout policy" not in shown


def test_steps_are_counted_from_the_session_s_first(html: Show) -> None:
    status = make_status(done=3)
    shown = html(replace(status, step=10, history=status.history[-3:]))
    assert "at step 7" in shown
    assert "at step 9" in shown


def test_a_long_run_is_drawn_with_a_bounded_number_of_points() -> None:
    rows = [make_metrics(step % 60) for step in range(5000)]
    drawn = str(panels([curve(rows, "rollout/raw_reward")]))
    assert drawn.count("L") <= 4 * MOST_POINTS


@pytest.mark.parametrize("values", [[1e308, -1e308], [5e-324, 0.0], [3.0], [2.0, 2.0]])
def test_panels_take_any_finite_value(values: list[float]) -> None:
    drawn = str(panels([curve([{"x": v} for v in values], "x")]))
    assert "nan" not in drawn.lower()
    assert "inf" not in drawn.lower()


def test_a_running_mean_of_some_points_is_that_of_all_there() -> None:
    points = [(float(i), float(i * i)) for i in range(20)]
    every = smooth(points, 5)
    assert smooth(points, 5, every=6) == [every[1], every[7], every[13], every[19]]


def test_buttons_start_pause_step_resume_and_stop(steps: Steps) -> None:
    dashboard = make_dashboard(steps)
    assert dashboard.go.description == "Train 5 steps"
    assert dashboard.stop.disabled
    dashboard.step.click()
    steps.may.release()
    await_value(dashboard.head, "value", lambda v: "1 of 5 steps" in v and "Paused" in v)
    assert not dashboard.step.disabled
    assert not dashboard.stop.disabled
    dashboard.go.click()
    # Paused before its step has begun, it would simply hold again.
    await_value(dashboard.head, "value", lambda v: "Running" in v)
    assert dashboard.go.description == "Pause"
    assert dashboard.step.disabled
    dashboard.go.click()
    await_value(dashboard.head, "value", lambda v: "Pausing after this step" in v)
    steps.may.release()
    await_value(dashboard.head, "value", lambda v: "2 of 5 steps" in v and "Paused" in v)
    assert dashboard.go.description == "Resume"
    dashboard.stop.click()
    await_value(dashboard.head, "value", lambda v: "Stopped" in v)
    assert dashboard.training.wait().stopped == "stopped by hand"


def test_the_button_of_a_session_that_was_trained_says_that_it_trains_on(steps: Steps) -> None:
    steps.may.release(3)
    for _ in range(3):
        steps.step()
    dashboard = make_dashboard(steps, 20)
    assert dashboard.go.description == "Train 20 more steps"
    assert "which have 3 steps" in dashboard.go.tooltip
    assert dashboard.step.description == "One step"


def test_a_dashboard_without_news_says_since_when_and_how_to_go_on(steps: Steps) -> None:
    dashboard = make_dashboard(steps)
    assert "No news" not in dashboard.head.value
    dashboard.go.click()
    await_value(dashboard.head, "value", lambda v: "Running" in v)
    silent = dashboard.head.value.partition("No news since ")[2]
    assert re.match(r"\d\d:\d\d:\d\d on \d{4}-\d\d-\d\d", silent)
    assert "session.dashboard()" in silent
    assert "RLSession.attach()" in silent
    steps.may.release(5)
    await_value(dashboard.head, "value", lambda v: "Finished" in v and "No news" not in v)


def test_a_click_that_comes_too_late_does_nothing(steps: Steps) -> None:
    dashboard = make_dashboard(steps)
    dashboard.stop.click()
    for button in (dashboard.go, dashboard.step, dashboard.stop):
        button.click()
    assert dashboard.training.state == "stopped"


def test_what_goes_wrong_is_shown_and_ends_the_dashboard(steps: Steps) -> None:
    dashboard = make_dashboard(steps)
    steps.step = lambda: 1 / 0  # type: ignore[assignment, return-value]
    dashboard.go.click()
    await_value(dashboard.head, "value", lambda v: "ZeroDivisionError" in v)
    with pytest.raises(ZeroDivisionError):
        dashboard.training.wait()


def test_buttons_have_names_and_can_be_reached(steps: Steps) -> None:
    dashboard = make_dashboard(steps)
    for button in (dashboard.go, dashboard.step, dashboard.stop):
        assert button.description
        assert button.tooltip
        assert button.tabbable is not False


def test_the_parts_are_the_picture(steps: Steps, html: Show) -> None:
    """What is shown live is what stays in the file."""
    dashboard = make_dashboard(steps)
    steps.may.release(5)
    dashboard.training.resume()
    dashboard.training.wait()
    await_value(dashboard.head, "value", lambda v: "Finished" in v)
    picture = html(dashboard.training.status)

    def is_in_the_picture(value: str) -> bool:
        inner = value.removeprefix(part().removesuffix("</div>")).removesuffix("</div>")
        return bool(inner) and inner in picture

    for widget in (dashboard.head, dashboard.curves, dashboard.samples):  # drawn in this order
        await_value(widget, "value", is_in_the_picture)
