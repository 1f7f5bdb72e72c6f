"""Training in a thread of its own, on the real stack: what can be asked of it and the session."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kit import RLSession, Rollout, Sample, StepReport
from kit.errors import KitError, SessionError
from kit.lifecycle import step
from kit.lifecycle.train_loop import Training, dashboard
from tests.cases import slow
from tests.steps import responses_and_metrics

PATIENCE = 120.0
"""Seconds until a test that waits in vain fails."""


class Gate:
    """Lets a training's steps end one at a time: `until` that never ends it."""

    def __init__(self) -> None:
        self._arrived, self._open = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, step: StepReport) -> bool:
        self._arrived.release()
        assert self._open.acquire(timeout=PATIENCE)
        return False

    def await_step(self) -> None:
        """Return when a step is nearly over: what is left of it is `open`."""
        assert self._arrived.acquire(timeout=PATIENCE)

    def open(self, steps: int = 1) -> None:
        """Let so many steps end."""
        self._open.release(steps)


def await_state(training: Training, *states: str) -> None:
    """Return when the training is in one of these states."""
    await_that(training, lambda: training.state in states)


def await_that(training: Training, holds: Callable[[], bool]) -> None:
    with training.changed:
        assert training.changed.wait_for(holds, PATIENCE), training


@pytest.fixture
def begin(session: RLSession) -> Iterator[Callable[..., Training]]:
    """Starts a training in a thread; whatever becomes of it, it has ended after the test."""
    made: list[tuple[Training, Gate | None]] = []

    def start(steps: int, gate: Gate | None = None, run: bool = True) -> Training:
        training = Training(session.debug, session.step, steps, gate)
        session.debug.lock.training = training
        made.append((training, gate))
        if run:
            training.resume()
        return training

    yield start
    for training, gate in made:
        if gate:
            gate.open(1000)
        assert training.close(PATIENCE)
    session.debug.lock.training = None


def in_a_step(begin: Callable[..., Training], steps: int) -> tuple[Training, Gate]:
    """A training in its first step, and the gate that lets its steps end."""
    gate = Gate()
    training = begin(steps, gate)
    gate.await_step()
    return training, gate


def in_a_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()), daemon=True)
    thread.start()
    return thread, found


@pytest.mark.slow
def test_a_thread_trains_exactly_as_a_cell_does(
    reseeded: Callable[[int], RLSession], begin: Callable[..., Training]
) -> None:
    in_the_cell = reseeded(3).train(3, show=False)
    reseeded(3)
    in_a_thread = begin(3).wait()
    assert responses_and_metrics(in_a_thread.steps) == responses_and_metrics(in_the_cell.steps)
    assert len(in_a_thread.history) == len(in_the_cell.history) == 3
    assert in_a_thread.stopped == ""


def test_a_pause_holds_after_the_step_under_way(
    session: RLSession, begin: Callable[..., Training]
) -> None:
    training, gate = in_a_step(begin, 5)
    training.pause()
    assert training.status.asked == "pause"
    gate.open(5)
    await_state(training, "paused")
    assert (training.done, session.step_count, session.engine_version) == (1, 1, 1)
    training.resume()
    assert len(training.wait()) == 5
    assert training.state == "finished"


def test_a_paused_training_leaves_the_session_to_its_verbs(
    session: RLSession, begin: Callable[..., Training]
) -> None:
    training, gate = in_a_step(begin, 2)
    training.pause()
    gate.open(2)
    await_state(training, "paused")
    rollout = session.score(session.generate(n_samples_per_prompt=1))
    assert len(rollout.rewards()) == 16
    assert session.check_mismatch().verdict == "pass"
    training.resume()
    assert len(training.wait()) == 2


def test_a_verb_after_a_pause_waits_for_the_step_and_no_longer(
    session: RLSession, begin: Callable[..., Training]
) -> None:
    training, gate = in_a_step(begin, 5)
    training.pause()
    thread, found = in_a_thread(lambda: session.generate(["1+1="], n_samples_per_prompt=1))
    assert not found
    gate.open(5)
    thread.join(PATIENCE)
    assert isinstance(found[0], Rollout)
    assert training.done == 1


VERBS: list[Callable[[RLSession], object]] = [
    lambda s: s.generate(),
    lambda s: s.check_mismatch(),
    lambda s: s.evaluate(),
    lambda s: s.sync(),
    lambda s: s.save(),
    lambda s: s.train(1, show=False),
    lambda s: s.train(1, dashboard=True),
]


def test_a_verb_while_training_runs_is_refused_and_says_what_to_do(
    session: RLSession, begin: Callable[..., Training]
) -> None:
    training, gate = in_a_step(begin, 2)
    for verb in VERBS:
        with pytest.raises(SessionError, match=r"while training runs(.|\n)*training\.pause\(\)"):
            verb(session)
    gate.open(2)
    assert len(training.wait()) == 2
    assert session.step_count == 2


def test_one_step_is_one_step(session: RLSession, begin: Callable[..., Training]) -> None:
    training = begin(5, run=False)
    for count in (1, 2):
        training.step_once()
        await_that(training, lambda count=count: training.done >= count)  # type: ignore[misc]
        await_state(training, "paused")
        assert training.done == session.step_count == count


def test_a_step_cannot_be_asked_of_a_running_training(begin: Callable[..., Training]) -> None:
    training, _ = in_a_step(begin, 2)
    with pytest.raises(SessionError, match="pause"):
        training.step_once()


def test_a_stop_ends_it_and_keeps_what_is_done(
    session: RLSession, begin: Callable[..., Training]
) -> None:
    training, gate = in_a_step(begin, 5)
    training.stop()
    gate.open()
    report = training.wait()
    assert len(report) == 1
    assert report.stopped == "stopped by hand"
    assert training.state == "stopped"
    with pytest.raises(SessionError, match="has ended"):
        training.resume()
    assert session.check_mismatch().verdict == "pass"


def test_a_training_stops_where_until_says(session: RLSession) -> None:
    training = Training(session.debug, session.step, 5, lambda step: step.step == 1)
    training.resume()
    report = training.wait()
    assert len(report) == 2
    assert "until" in report.stopped


@pytest.mark.parametrize("error", [ValueError("not like this"), *slow(KeyboardInterrupt())])
def test_what_is_raised_in_a_step_is_raised_from_wait(
    session: RLSession, error: BaseException
) -> None:
    def fail(step: StepReport) -> bool:
        raise error

    training = Training(session.debug, session.step, 5, fail)
    training.resume()
    with pytest.raises(type(error)):
        training.wait()
    assert training.state == "failed"
    assert str(error) in training.status.error
    assert len(session.generate()) == 128


def test_a_reward_that_fails_for_all_ends_training_with_its_own_message(session: RLSession) -> None:
    def broken(sample: Sample) -> float:
        raise KeyError("answer")

    before, session.debug.reward = session.debug.reward, broken
    try:
        training = Training(session.debug, session.step, 5)
        training.resume()
        with pytest.raises(KitError, match="answer"):
            training.wait()
    finally:
        session.debug.reward = before
    assert "No group of this rollout could be trained on" in training.status.error


def test_a_verb_called_by_a_step_is_part_of_it(session: RLSession) -> None:
    def until(step: StepReport) -> bool:
        return bool(session.generate(["1+1="], n_samples_per_prompt=1))

    training = Training(session.debug, session.step, 5, until)
    session.debug.lock.training = training
    training.resume()
    assert len(training.wait()) == 1


def test_interrupting_the_wait_for_a_training_leaves_it_running(
    begin: Callable[..., Training],
) -> None:
    training, gate = in_a_step(begin, 2)
    timer = threading.Timer(0.2, signal.raise_signal, (signal.SIGINT,))

    def wait() -> None:
        timer.start()
        training.wait()

    with pytest.raises(KeyboardInterrupt):
        wait()
    assert training.state == "running"
    gate.open(2)
    assert len(training.wait()) == 2


@pytest.mark.parametrize("moment", ["evaluate", *slow("save")])
def test_an_interrupt_after_the_update_keeps_the_step_it_belongs_to(
    session: RLSession, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def press(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    before, rows = session.step_count, len(session.history)
    with monkeypatch.context() as patch:
        if moment == "evaluate":
            config = session.config.replace("evaluation.interval", 1)
            config = config.replace("evaluation.skip_eval_before_train", True)
            patch.setattr(session.debug.state, "config", config)
            patch.setattr(type(session), "evaluate", press)
        else:
            patch.setattr(step, "save_where_due", press)
        report = session.train(3, show=False)
    assert [step.step for step in report] == [before]
    assert (session.step_count, len(session.history)) == (before + 1, rows + 1)
    assert session.history[-1] == {"step": before, **report.steps[0].metrics}
    assert report.stopped == f"interrupted after step {before}"
    assert [step.step for step in session.train(1, show=False)] == [before + 1]


def test_waiting_for_a_training_that_has_not_begun_is_refused(session: RLSession) -> None:
    with pytest.raises(SessionError, match=r"resume\(\)"):
        Training(session.debug, session.step, 3).wait()


def test_a_script_trains_to_the_end_before_it_goes_on(session: RLSession) -> None:
    training = session.train(2, dashboard=True)
    assert training.state == "finished"
    assert len(training.wait()) == 2


def test_a_dashboard_shows_the_training_under_way_or_one_that_can_be_begun(
    session: RLSession, begin: Callable[..., Training], capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate()
    under_way = begin(2, gate)
    gate.await_step()
    assert dashboard(session.debug, session.step, None) is under_way
    gate.open(2)
    under_way.wait()
    assert session.dashboard() is under_way  # what it left, and nothing that could begin
    assert "session.dashboard(20) has buttons for 20 more steps" in capsys.readouterr().out
    assert session.training is under_way
    fresh = session.dashboard(4)
    assert (fresh.state, fresh.total) == ("ready", 4)
    assert "Training(ready, 0 of 4 steps)" in capsys.readouterr().out
    assert session.dashboard(4) is session.dashboard() is fresh
    other = session.dashboard(7)
    assert (fresh.state, other.state, other.total) == ("stopped", "ready", 7)


def test_a_training_that_is_half_done_is_not_replaced_in_silence(
    session: RLSession, begin: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kit.lifecycle.train_loop.frontend", lambda: "headless")
    training, gate = in_a_step(begin, 3)
    training.pause()
    gate.open(3)
    await_state(training, "paused")
    with pytest.raises(SessionError, match=r"1 of 3 steps(.|\n)*training\.stop\(\)"):
        session.train(1, dashboard=True)


@pytest.mark.slow
def test_closing_a_session_in_the_middle_of_a_step_ends_its_training(session: RLSession) -> None:
    """Last in this file: the next test that needs a session starts another one."""
    session.debug.sampler.max_response_len = 480
    session.configure({"rollout.temperature": 50.0}, n_samples_per_prompt=128)
    training = Training(session.debug, session.step, 100)
    session.debug.lock.training = training
    training.resume()
    await_state(training, "running")
    session.close()
    assert training.close(PATIENCE)
    assert training.state == "stopped"
    assert training.wait().stopped == "the session was closed"
    with pytest.raises(SessionError, match="closed"):
        session.generate()
