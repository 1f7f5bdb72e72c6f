"""Ctrl-C while each verb works, on the real stack: nothing is cut in two, and nothing is lost."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from kit import RLSession
from kit.samples import Batch, Sample, Status
from tests.cases import slow
from tests.faults.interrupted_starts import MOMENTS
from tests.faults.interrupts import digests, interrupted
from tests.processes import assert_gone

ROOT = Path(__file__).parents[2]

VERBS: dict[str, Callable[[RLSession], Any]] = {
    "generate": lambda s: s.generate(["12+34="], n_samples_per_prompt=256),
    "score": lambda s: s.score(s.last_rollout),
    "sync": lambda s: s.sync(verify=True),
    "evaluate": lambda s: s.evaluate(),
    "check": lambda s: s.check(),
    "check_mismatch": lambda s: s.check_mismatch(s.last_rollout, deep=True),
}


@pytest.fixture
def rambling(session: RLSession) -> Iterator[RLSession]:
    """Responses that are long and seldom end by themselves."""
    prompting = session.debug.sampler
    before = prompting.config, prompting.max_response_len
    prompting.config = prompting.config.replace("rollout.temperature", 50.0)
    prompting.max_response_len = 480
    yield session
    prompting.config, prompting.max_response_len = before


def test_an_interrupted_generate_keeps_what_is_written_and_the_next_one_works_at_once(
    rambling: RLSession,
) -> None:
    for after in (0.5, 1.0, 2.0, 4.0, 0.3, 0.7, 1.5, 3.0):  # a busy machine is now early, now late
        place = rambling.debug.state.stream.state()
        came = interrupted(rambling.generate, after)
        kept = rambling.last_rollout
        if came and kept and any(begun(s) for s in kept):
            break
    assert came
    assert kept is not None
    assert {s.status for s in kept} <= {Status.COMPLETED, Status.ABORTED, Status.TRUNCATED}
    assert any(begun(s) for s in kept)
    assert all(len(s.rollout_log_probs or []) == s.response_length for s in kept)
    assert rambling.debug.state.stream.state() == place  # the same prompts come next
    rambling.debug.sampler.max_response_len = 8
    assert len(rambling.generate()) == 128
    assert not any(engine_requests(rambling))


def begun(sample: Sample) -> bool:
    """Was it stopped in the midst of its response?"""
    return sample.status is Status.ABORTED and sample.response_length > 0


def engine_requests(session: RLSession) -> list[int]:
    """Requests that each engine has not answered."""
    stack = session.debug.stack
    return stack.engines.ask("unanswered")


def test_an_interrupt_and_another_one_at_once_leave_nothing_running(rambling: RLSession) -> None:
    assert any(interrupted(rambling.generate, after, again=0.02) for after in (0.4, 0.2, 0.1))
    rambling.debug.sampler.max_response_len = 8
    assert len(rambling.generate()) == 128
    assert not any(engine_requests(rambling))


def large(batch: Batch, length: int = 100) -> Batch:
    """The same prompts with long responses of chance, for several micro-batches."""
    draw = random.Random(0)
    samples = [
        replace(
            sample,
            tokens=sample.tokens[: -sample.response_length] + draw.choices(range(3, 100), k=length),
            response_length=length,
            rollout_log_probs=[-4.0] * length,
            loss_mask=None,
            metadata={},
            weight_versions=[0],
        )
        for sample in batch.samples
    ]
    return replace(batch, samples=tuple(samples), id="large")


@pytest.mark.slow
def test_an_interrupted_update_stops_at_a_micro_batch_or_is_complete_and_says_so(
    session: RLSession,
) -> None:
    batch = large(session.advantages(session.score(session.generate())))
    seconds = min(session.update(replace(batch, id=name)).seconds for name in "ab")
    draw = random.Random(0)
    ends: Counter[str] = Counter()
    for number in range(30):
        if number >= 3:
            if ends["stopped"]:
                break
            seconds *= 0.8  # they were measured while the machine was busy: press sooner
        before, steps = digests(session), session.step_count
        one = replace(batch, id=f"update {number}")
        came = interrupted(lambda one=one: session.update(one), draw.uniform(0, 1.2) * seconds)
        if came and session.last_batch is not one:  # pressed before it had begun
            continue
        assert session.last_batch is one
        made = session.step_count - steps
        assert (digests(session) != before) == bool(made)
        ends["whole" if made else "stopped"] += came
        assert session.update(one).applied == (not made)  # never twice
        assert session.step_count == steps + 1
    assert ends["stopped"]


@pytest.mark.parametrize(
    "verb", ["generate", "sync", *slow("score", "evaluate", "check", "check_mismatch")]
)
def test_an_interrupted_verb_changes_nothing_and_works_when_called_again(
    session: RLSession, verb: str, tmp_path: Path
) -> None:
    session.train(1, show=False)
    session.generate()
    call, draw = VERBS[verb], random.Random(verb)
    begin = time.perf_counter()
    call(session)
    seconds = time.perf_counter() - begin
    before, place = digests(session), session.debug.state.stream.state()
    for _ in range(1 if verb.startswith("check") else 4):
        interrupted(lambda: call(session), draw.uniform(0, 1) * seconds, again=0.01)
        assert digests(session) == before
        assert (session.step_count, session.debug.state.stream.state()) == (1, place)
    call(session)
    session.sync(verify=True)
    assert session.engine_version == 1
    assert session.check_mismatch(session.generate(["1+1="])).verdict == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("presses", [10, *slow(50)])
def test_interrupts_at_random_moments_change_nothing_of_what_is_learned(
    session: RLSession, reseeded: Callable[[int], RLSession], presses: int
) -> None:
    expected = {0: digests(session)}
    begin, steps = time.perf_counter(), 6
    for number in range(steps):
        session.step()
        expected[number + 1] = digests(session)
    seconds = (time.perf_counter() - begin) / steps
    history = without_times(session)

    session = reseeded(0)
    draw, pressed = random.Random(7), 0
    again: dict[str, Callable[[], Any]] = {
        "step": session.step,
        "train": lambda: session.train(1, show=False),
        "sync": session.sync,
        "evaluate": session.evaluate,
        "look": lambda: look(session),
    }
    while pressed < presses:
        if session.step_count == steps:
            again.pop("step", None), again.pop("train", None)
        name = draw.choice(sorted(again))
        came = interrupted(again[name], draw.uniform(0, 0.5) * seconds)
        pressed += 1
        assert digests(session) == expected[session.step_count], (name, came)
        assert len(session.history) == session.step_count
    while session.step_count < steps:
        session.step()
    assert digests(session) == expected[steps]
    assert without_times(session) == history
    session.sync(verify=True)
    assert not any(engine_requests(session))


def look(session: RLSession) -> None:
    """Where an interrupt has left something to look at."""
    if any(sample.response_length for sample in session.last_rollout or ()):
        session.check_mismatch(session.last_rollout)


def without_times(session: RLSession) -> list[dict[str, float]]:
    return [
        {name: value for name, value in row.items() if not name.startswith("perf/")}
        for row in session.history
    ]


@pytest.mark.slow
@pytest.mark.wider
def test_an_interrupted_start_leaves_nothing_and_the_next_one_works() -> None:
    """At the head, at Ray, while SGLang is imported and while weights are loaded."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.interrupted_starts"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    left, steps = json.loads(done.stdout.splitlines()[-1])
    assert left == {moment: [] for moment in MOMENTS}
    assert steps == 1


@pytest.mark.slow
def test_a_start_whose_workers_do_not_come_can_be_interrupted(tmp_path: Path) -> None:
    script = "from kit import RLSession; RLSession.start('tiny')"
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", script],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=output,
            stderr=output,
        )
    zygote = child(process, "kit.cluster.fork_server")
    zygote.suspend()  # nor does it on a machine that is far too busy
    head = child(process, "kit.cluster.head").cmdline()
    address = Path(head[head.index("kit.cluster.head") + 1]) / "address"
    while not address.exists():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    time.sleep(8)  # it joins Ray, and waits for workers
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert "KeyboardInterrupt" in log.read_text()
    assert not address.parent.exists()
    assert not zygote.is_running()


def child(process: subprocess.Popen[bytes], module: str) -> psutil.Process:
    """The process that runs a module for this one."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        for one in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if module in one.cmdline():
                    return one
        time.sleep(0.02)
    raise AssertionError(f"{module} was not started")


@pytest.mark.slow
def test_an_interrupt_during_close_is_raised_when_everything_has_ended(session: RLSession) -> None:
    class Logger:
        def close(self) -> None:
            signal.raise_signal(signal.SIGINT)

    cluster = session.debug.stack.cluster
    session.debug.tracker.loggers = Logger()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        session.close()
    assert_gone(cluster.entry.head, str(cluster.directory), seconds=0)
    assert RLSession.current() is None
