"""Rewards, batches and files that are faulty: what is told, and that nothing is lost by them."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, Sample
from kit.errors import StackError
from kit.rewards import score_samples
from kit.rewards.timeouts import LIMIT
from kit.samples import Status
from kit.tracking.recorder import Recorder
from tests.faults.interrupts import digests


@pytest.fixture
def short_limit() -> Iterator[None]:
    before, LIMIT.seconds = LIMIT.seconds, 2.0
    yield
    LIMIT.seconds = before


def samples(count: int = 3) -> list[Sample]:
    return [Sample(index=i, status=Status.COMPLETED, label="1") for i in range(count)]


def waits(sample: Sample) -> float:
    if sample.index == 1:
        threading.Event().wait()
    return 1.0


def spins(sample: Sample) -> float:
    while sample.index == 1:
        pass
    return 1.0


async def awaits(sample: Sample) -> float:
    if sample.index == 1:
        await asyncio.Event().wait()
    return 1.0


def runs_out(sample: Sample) -> float:
    if sample.index == 1:
        raise MemoryError
    return 1.0


@pytest.mark.usefixtures("short_limit")
@pytest.mark.parametrize("reward", [waits, spins, awaits])
def test_a_reward_that_hangs_is_ended_and_marks_its_sample_alone(reward: Any) -> None:
    scored = score_samples(samples(), reward)
    assert [s.reward for s in scored] == [1.0, None, 1.0]
    assert "reward.timeout" in str(scored[1].error)


@pytest.mark.usefixtures("short_limit")
def test_a_reward_that_hangs_is_ended_in_a_training_under_a_dashboard_too() -> None:
    found: list[Sample] = []
    thread = threading.Thread(target=lambda: found.extend(score_samples(samples(), spins)))
    thread.start()
    thread.join()
    assert [s.reward for s in found] == [1.0, None, 1.0]
    assert "reward.timeout" in str(found[1].error)


def test_a_reward_that_exhausts_memory_marks_its_sample_alone() -> None:
    scored = score_samples(samples(), runs_out)
    assert [s.reward for s in scored] == [1.0, None, 1.0]
    assert "MemoryError" in str(scored[1].error)


@pytest.mark.slow
def test_an_update_that_is_no_number_is_refused_names_the_token_and_keeps_the_batch(
    session: RLSession,
) -> None:
    batch = session.advantages(session.score(session.generate()))
    before = digests(session)
    bad = (*batch.advantages[:3], math.nan, *batch.advantages[4:])
    object.__setattr__(batch, "advantages", bad)
    with pytest.raises(StackError, match=r"sample 3 of the batch, token 0 .* its advantage is nan"):
        session.update(batch)
    assert session.last_batch is batch
    assert digests(session) == before
    assert session.step_count == 0
    again = session.advantages(session.score(session.generate()))
    assert session.update(again).applied


def test_a_metrics_file_that_cannot_be_written_stops_no_training(
    session: RLSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocked = tmp_path / "a file, where a folder should be"
    blocked.write_text("")
    monkeypatch.setattr(session.debug.tracker, "recorder", Recorder(blocked))
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        report = session.train(2, show=False)
    assert len(report) == len(session.history) == session.step_count == 2


def test_a_reward_whose_network_is_gone_marks_its_samples_and_the_session_lives(
    session: RLSession,
) -> None:
    def asks(sample: Sample) -> float:
        import urllib.request

        with urllib.request.urlopen("http://127.0.0.1:9/") as answer:
            return float(answer.read())

    scored = session.score(session.generate(), reward=asks)
    assert len(scored.failed()) == len(scored)
    assert "URLError" in str(scored[0].error)
    assert session.step().update.applied
