"""What an update would have done, on the real stack; and that nothing of it stays."""

from __future__ import annotations

import math
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kit import Batch, RLSession
from kit.errors import ConfigError, DataError, SessionError, StackError
from kit.reports.what_if import WhatIf
from tests.cases import slow
from tests.checkpoint.test_snapshots import checksums, steps
from tests.steps import responses_and_metrics


def a_batch(session: RLSession) -> Batch:
    return session.advantages(session.score(session.generate()))


def test_each_trial_shows_the_update_that_a_session_with_its_settings_makes(
    session: RLSession,
) -> None:
    session.step()
    batch = a_batch(session)
    rate = session.config.training.learning_rate
    tried = session.what_if(lr=[rate / 10, 10 * rate], batch=batch)
    assert [t.label for t in tried] == [
        "as configured",
        f"learning_rate {rate / 10:g}",
        f"learning_rate {10 * rate:g}",
    ]
    session.snapshot("before")
    for trial in tried:
        session.restore("before")
        session.debug.use(session.config.model_copy(update={"training": trial.training}))
        update = session.update(replace(batch, id=trial.label))
        assert trial.update is not None
        assert trial.update.metrics == update.metrics
        assert [s.token_values["trainer_log_prob"] for s in trial.after or ()] == session.log_probs(
            batch.samples
        )


def test_nothing_of_a_trial_stays(session: RLSession) -> None:
    session.step()
    batch = a_batch(session)
    session.snapshot("here")
    expected = responses_and_metrics(steps(session, 2))
    session.restore("here")
    before, config = checksums(session), session.config
    stood = (session.step_count, session.weight_version, session.debug.state.stream.state())
    rollout, last = session.last_rollout, session.last_batch
    session.what_if(lr=1e-2, eps_clip=[0.1, 0.3], batch=batch)
    assert checksums(session) == before
    assert session.config is config
    assert (session.step_count, session.weight_version, session.debug.state.stream.state()) == stood
    assert (session.last_rollout, session.last_batch) == (rollout, last)
    assert [s.name for s in session.snapshots()] == ["first", "here"]
    assert responses_and_metrics(steps(session, 2)) == expected


def test_larger_steps_move_more_and_the_way_that_advantages_point(session: RLSession) -> None:
    batch = a_batch(session)
    tried = session.what_if(lr=[1e-6, 1e-5, 3e-4], batch=batch)
    small, middle, large = (t.movement for t in tried[1:])
    assert small.mean_abs < middle.mean_abs < large.mean_abs
    assert small.kl < middle.kl < large.kl
    assert large.praised > 0 > large.blamed
    assert large.as_meant > 0.5
    assert large.tokens == sum(sum(s.mask) for s in batch.samples)


def test_after_a_step_the_trials_begin_with_the_snapshot_whose_weights_wrote_the_batch(
    session: RLSession,
) -> None:
    session.step()
    session.snapshot("before")
    made = session.step().update
    tried = session.what_if(lr=2e-4)
    assert (tried.snapshot, tried.weight_version, tried.step, tried.notes) == ("before", 1, 1, ())
    assert tried[0].update.metrics == made.metrics
    assert session.step_count == session.weight_version == session.engine_version == 2
    session.forget("before")
    further = session.what_if(lr=2e-4)
    assert (further.snapshot, further.weight_version) == ("", 2)
    assert "a further pass over old samples" in further.notes[0]
    assert further[0].update.applied
    assert further[0].update.metrics != made.metrics


def test_a_snapshot_on_disk_can_be_where_trials_begin(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    session.step()
    session.snapshot("kept", on_disk=True)
    made = session.step().update
    before = checksums(session)
    tried = session.what_if(lr=2e-4, snapshot="kept")
    assert tried[0].update.metrics == made.metrics
    assert checksums(session) == before


def test_a_trial_that_is_kept_is_the_update_that_was_shown_and_its_settings_stay(
    session: RLSession,
) -> None:
    batch = a_batch(session)
    tried = session.what_if(lr=[1e-5, 2e-4], batch=batch)
    report = session.keep(tried, 2)
    assert report.metrics == tried[2].update.metrics
    assert session.config.training.learning_rate == 2e-4
    assert (session.step_count, session.weight_version, session.engine_version) == (1, 1, 1)
    assert session.log_probs(batch.samples) == [
        s.token_values["trainer_log_prob"] for s in tried[2].after
    ]
    assert session.check_mismatch(session.generate()).verdict == "pass"
    assert session.step().metrics["train/lr"] == 2e-4
    with pytest.raises(SessionError, match="began with weights version 0; these are version 2"):
        session.keep(tried, 1)


@pytest.mark.slow
def test_a_trial_from_a_snapshot_is_kept_in_place_of_the_step_that_was_made(
    session: RLSession,
) -> None:
    session.step()
    session.snapshot("before")
    session.step()
    tried = session.what_if(lr=2e-4)
    assert tried.snapshot == "before"
    session.keep(tried, 1)
    assert (session.step_count, session.weight_version, session.engine_version) == (2, 3, 3)
    assert [row["step"] for row in session.history] == [0, 1]
    session.restore("before")
    assert session.config.training.learning_rate != 2e-4


def test_a_trial_that_is_refused_says_why_and_cannot_be_kept(session: RLSession) -> None:
    batch = a_batch(session)
    bad = replace(batch, advantages=(math.nan, *batch.advantages[1:]), token_advantages=None)
    before = checksums(session)
    tried = session.what_if(lr=2e-4, batch=bad)
    assert all(t.update is None and "refused" in t.refused for t in tried)
    assert "was refused" in str(tried)
    with pytest.raises(SessionError, match="nothing to keep"):
        session.keep(tried, 1)
    assert checksums(session) == before


def test_after_a_refused_batch_the_one_before_is_tried_and_a_note_says_so(
    session: RLSession,
) -> None:
    session.step()
    trained = session.last_batch
    assert trained is not None
    plain = replace(trained, token_advantages=None)
    bad = replace(plain, advantages=(math.nan, *trained.advantages[1:]), id="bad")
    with pytest.raises(StackError, match="refused"):
        session.update(bad)
    for last in (bad, replace(plain, samples=(), advantages=(), id="empty")):
        if last is not bad:
            assert not session.update(last).applied
        assert session.last_batch is last
        tried = session.what_if(lr=2e-4)
        assert tried.batch is trained
        assert tried[1].update is not None
        assert "batch=session.last_batch" in str(tried)
    session.step()
    again = session.what_if(lr=2e-4)
    assert again.batch is session.last_batch
    assert "batch=session.last_batch" not in str(again)
    session.restore("first")
    with pytest.raises(SessionError, match="no batch to try"):
        session.what_if(lr=2e-4)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({}, ConfigError, "nothing to try"),
    ({"lr": []}, ConfigError, "nothing to try"),
    ({"lr": 2.0}, ConfigError, "learning_rate"),
    ({"lr": "fast"}, ConfigError, "learning_rate"),
    ({"settings": {"learning_rte": 1}}, ConfigError, "Did you mean 'learning_rate'"),
    ({"settings": {"gamma": 0.9}}, ConfigError, "an update does not read it"),
    ({"settings": {"num_trainers": 2}}, ConfigError, "an update does not read it"),
    ({"settings": {"kl_loss_coef": 0.1}}, ConfigError, "needs a reference model"),
    ({"lr": [1e-5] * 4, "eps_clip": [0.1] * 4}, ConfigError, "16 combinations"),
    ({"lr": 1e-5, "snapshot": "befor"}, SessionError, "no snapshot 'befor'"),
    ({"lr": 1e-5, "batch": []}, SessionError, "needs a batch, got list"),
    ({"lr": 1e-5, "batch": Batch((), ())}, DataError, "no samples"),
]


def test_what_cannot_be_tried_is_refused_in_words(session: RLSession) -> None:
    session.debug.state.last_batch = a_batch(session)
    for arguments, kind, says in WRONG:
        with pytest.raises(kind, match=says):
            session.what_if(**arguments)


def test_without_a_batch_it_says_where_one_comes_from(session: RLSession) -> None:
    with pytest.raises(SessionError, match=r"no batch to try(.|\n)*session\.last_batch"):
        session.what_if(lr=1e-5)
    with pytest.raises(SessionError, match="no trial 7"):
        session.keep(session.what_if(lr=1e-5, batch=a_batch(session)), 7)
    with pytest.raises(SessionError, match="keep needs a WhatIf"):
        session.keep(3, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("delay", [0.0, *slow(0.1, 0.02, 0.05, 0.2, 0.3)])
def test_an_interrupt_in_the_middle_of_trials_leaves_everything_as_it_was(
    session: RLSession, delay: float
) -> None:
    batch = a_batch(session)
    session.update(batch)
    before, config = checksums(session), session.config
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(delay, signal.pthread_kill, (main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        try_until_the_end_of(timer, session)
    timer.join()
    assert checksums(session) == before
    assert session.config is config
    assert (session.step_count, session.weight_version) == (1, 1)
    assert not session.update(batch).applied  # the trainer still knows that it has had it
    session.step()


def try_until_the_end_of(timer: threading.Timer, session: RLSession) -> None:
    """The interrupt comes while it tries, or while it waits with all done."""
    timer.start()
    session.what_if(lr=[1e-5, 1e-3, 1e-2])
    timer.join()


@pytest.mark.slow
def test_it_shows_all_ways_side_by_side(session: RLSession) -> None:
    tried = session.what_if(lr=[1e-5, 1e-3], batch=a_batch(session))
    assert isinstance(tried, WhatIf)
    shown = tried._repr_mimebundle_()
    for text in shown.values():
        for words in ("as configured", "learning_rate 0.001", "as meant", "The same in all: loss"):
            assert words in text
        assert "session.keep(tried, i)" in text
    assert shown["text/html"].count("<details") >= 4
