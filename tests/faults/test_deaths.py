"""Processes of the stack that are killed: what is found out, what goes on, what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit import RLSession
from kit.errors import StackError
from kit.stack import engines
from tests.cases import slow, some
from tests.faults.interrupts import digests
from tests.processes import (
    DETOKENIZER,
    SCHEDULER,
    assert_gone,
    kill,
    of_engine,
    of_head,
    of_trainer,
)
from tests.steps import responses_and_metrics

PARTS = {"actor": 0, "scheduler": SCHEDULER, "detokenizer": DETOKENIZER}


def later(process: psutil.Process, seconds: float = 0.3) -> threading.Timer:
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    return timer


@pytest.mark.slow
@pytest.mark.parametrize("part", ["scheduler", "actor", "detokenizer"])
def test_an_engine_that_died_while_idle_is_there_again_for_the_next_call(
    session: RLSession, part: str
) -> None:
    session.train(1, show=False)
    before, victims = digests(session), session.debug.stack.watch.members("engine 0")
    kill(of_engine(session, 0, PARTS[part]))
    rollout = session.generate()
    assert len(rollout) == 128
    assert rollout.written_by({1})
    assert session.check_mismatch(rollout).verdict == "pass"
    session.sync(verify=True)
    assert digests(session) == before
    assert not any(process.is_running() for process in victims)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["starting", *slow("made")])
def test_an_interrupt_while_an_engine_is_started_again_leaves_it_to_the_next_call(
    session: RLSession, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    session.train(1, show=False)
    before = digests(session)
    calls = session.debug.stack.calls
    make, get = engines.make_engine, calls.get

    def interrupted_make(*given: Any) -> Any:
        made = make(*given)
        if moment == "made":  # past the point at which Ctrl-C is held back
            raise KeyboardInterrupt
        return made

    def interrupted_get(waiting: Any, verb: str, *rest: Any) -> Any:
        if (moment, verb) == ("starting", "start"):
            time.sleep(0.5)
            raise KeyboardInterrupt
        return get(waiting, verb, *rest)

    kill(of_engine(session, 0))
    with monkeypatch.context() as patch:
        patch.setattr(engines, "make_engine", interrupted_make)
        patch.setattr(calls, "get", interrupted_get)
        with pytest.raises(KeyboardInterrupt):
            session.sync()
    assert len(session.generate()) == 128
    assert session.sync(verify=True).verified
    assert digests(session) == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "at_once"),
    [("scheduler", False), ("actor", True), ("actor", False), ("scheduler", True)],
)
def test_a_generate_whose_engine_dies_is_finished_with_the_same_responses(
    session: RLSession, part: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kit.rollout.sampler.SHORT", 1e9 if at_once else 0.0)
    prompting = session.debug.sampler
    monkeypatch.setattr(prompting, "max_response_len", 400)
    monkeypatch.setattr(prompting, "config", prompting.config.replace("rollout.temperature", 50.0))
    rows = session.debug.state.stream.next(16)
    ask: Any = (session.debug.stack, rows, 2, prompting.sampling(), "a seed", 0)
    expected = prompting.write(*ask).complete()
    timer = later(of_engine(session, 0, PARTS[part]))
    found = prompting.write(*ask).complete()
    timer.join()
    assert [s.response_tokens for s in found] == [s.response_tokens for s in expected]
    monkeypatch.undo()
    assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.slow
def test_a_step_whose_engine_dies_learns_what_it_would_have_learned(session: RLSession) -> None:
    session.step()
    expected = digests(session)
    for engine in range(session.debug.stack.layout.replicas):
        kill(of_engine(session, engine))
    session.step()
    assert session.step_count == 2
    assert digests(session) != expected


@pytest.mark.wider
@pytest.mark.parametrize("part", ["engine", "trainer"])
def test_a_process_that_is_stopped_and_goes_on_later_changes_nothing(
    session: RLSession, part: str
) -> None:
    session.snapshot("before")
    expected = responses_and_metrics([session.step()])
    weights = digests(session)
    session.restore("before")
    stopped = of_trainer(session) if part == "trainer" else of_engine(session, 0, SCHEDULER)
    stopped.suspend()
    goes_on = threading.Timer(some(2.0, 60.0), stopped.resume)
    goes_on.start()
    assert responses_and_metrics([session.step()]) == expected
    goes_on.join()
    assert digests(session) == weights
    assert not session.debug.stack.watch.dead()


@pytest.mark.slow
def test_a_trainer_that_died_is_told_and_a_checkpoint_continues(
    session: RLSession, tmp_path: Path
) -> None:
    session.train(1, show=False)
    saved = session.save(tmp_path / "one")
    batch = session.advantages(session.score(session.generate()))
    stack = session.debug.stack.cluster
    kill(of_trainer(session))
    for call in (lambda: session.update(batch), session.sync, session.step, session.save):
        with pytest.raises(StackError, match=r"trainer.*died(.|\n)*RLSession\.load"):
            call()
    assert session.step_count == 1
    assert len(session.generate(["1+1="])) == 8  # the engine has its weights still
    with RLSession.load(saved) as loaded:
        assert_gone(stack.entry.head, str(stack.directory))
        assert loaded.step_count == 1
        assert loaded.check_mismatch(loaded.generate()).verdict == "pass"
        loaded.step()


@pytest.mark.slow
def test_a_trainer_that_dies_while_a_session_starts_is_told_as_what_it_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not as a loss: there is no checkpoint to go on from."""

    def killed(config: Any, stack: Any, sampler: Any) -> None:
        psutil.Process(stack.trainers.ask("processes")[0][0]).kill()
        stack.trainers.ask("processes")

    monkeypatch.setattr("kit.lifecycle.start.check_agreement", killed)
    with pytest.raises(StackError, match="A trainer's process died during") as caught:
        RLSession.start("tiny")
    assert "Nothing had been trained yet." in str(caught.value)
    assert "start it again" in str(caught.value)
    assert "checkpoint" not in str(caught.value)


@pytest.mark.slow
def test_an_engine_that_comes_back_without_a_trainer_writes_nothing(session: RLSession) -> None:
    session.train(1, show=False)
    kill(of_trainer(session))
    kill(of_engine(session, 0))
    for _ in range(2):  # it has the weights of the model's files, which nobody has asked for
        with pytest.raises(StackError, match=r"trainer.*died"):
            session.generate(["1+1="])


@pytest.mark.slow
def test_a_checkpoint_can_be_read_into_a_stack_whose_trainer_died(
    session: RLSession, tmp_path: Path
) -> None:
    session.train(1, show=False)
    before, saved = digests(session), session.save(tmp_path / "one")
    session.train(1, show=False)
    timer = later(of_trainer(session), 0.0)
    with pytest.raises(StackError, match="trainer"):
        session.train(1000, show=False)
    timer.join()
    session.restore(saved)
    assert digests(session) == before
    assert session.step_count == session.engine_version == 1
    session.train(1, show=False)
    session.sync(verify=True)
    session.close()  # what the trainer held for other tests died with it


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "process"),
    [("idle", "control service"), ("busy", "raylet"), ("busy", "first process")],
)
def test_when_ray_dies_it_is_told_the_notebook_lives_and_a_checkpoint_continues(
    session: RLSession, tmp_path: Path, process: str, moment: str
) -> None:
    saved = session.save(tmp_path / "none")
    stack = session.debug.stack.cluster
    which = ["first process", "control service", "raylet"].index(process)
    victim = of_head(session, which)
    timer = later(victim) if moment == "busy" else None
    if timer is None:
        kill(victim)
    with pytest.raises(StackError, match=r"Ray(.|\n)*RLSession\.load"):
        session.train(1000, show=False)
    if timer:
        timer.join()
    with RLSession.load(saved) as loaded:
        assert_gone(stack.entry.head, str(stack.directory))
        loaded.step()


UNNOTICED = """
import time
from kit import RLSession
from tests.processes import of_head

session = RLSession.start("tiny")
service = of_head(session, 1)
session.debug.stack.watch.close()  # nobody sees it
service.kill()
time.sleep(75)
session.close()
print("lives")
"""


@pytest.mark.slow
def test_a_kernel_outlives_rays_control_service_by_more_than_the_minute_that_ray_gives_it() -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", UNNOTICED],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.splitlines()[-1:] == ["lives"], done.stderr
