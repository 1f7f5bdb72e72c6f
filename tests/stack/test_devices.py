"""Several trainers and engines: the same learning as one, and what becomes of the others when one
fails.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from kit import RLSession, SessionConfig
from kit.cluster.processes import TRAINER
from kit.errors import KitError, StackError
from kit.samples import Batch
from tests.cases import slow
from tests.conftest import Shared
from tests.faults.interrupts import digests, interrupted
from tests.faults.test_interrupts import large
from tests.processes import SCHEDULER, kill, of_engine, of_trainer

TIMES = ("perf/",)


def learned(session: RLSession, steps: int = 2) -> list[dict[str, float]]:
    """The metrics of so many steps, without the times."""
    rows = [session.step().metrics for _ in range(steps)]
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    """Within what float32 makes of another order of additions."""
    for row, other in zip(found, expected, strict=True):
        assert row.keys() == other.keys()
        for name, value in other.items():
            assert row[name] == pytest.approx(value, rel=1e-3, abs=2e-5), name


def update_for_ever(session: RLSession, batch: Batch) -> None:
    for number in range(1000):
        session.update(replace(batch, id=str(number)))


@dataclass(frozen=True)
class Devices:
    """So many trainers and so many engines, on the same devices or apart."""

    each: int
    colocate: bool
    address: str | None = None
    """Of the cluster that they are on, where the session has none of its own."""

    @property
    def config(self) -> SessionConfig:
        """The tiny preset on them."""
        config = SessionConfig.preset("tiny").replace("training.num_trainers", self.each)
        config = config.replace("engine.replicas", self.each)
        config = config.replace("cluster.address", self.address)
        return config.replace("cluster.colocate", self.colocate)

    def __str__(self) -> str:
        return f"{self.each} {'colocated' if self.colocate else 'disaggregated'}"


@pytest.fixture(scope="module")
def of_one(shared: Shared) -> list[dict[str, float]]:
    """What one trainer learns in two steps."""
    session = shared.at(seed=0)
    rows = learned(session)
    session.close(keep_warm=True)
    return rows


Several = tuple[RLSession, list[dict[str, float]]]


@pytest.fixture(
    scope="module",
    params=[Devices(2, False), *slow(Devices(2, True), Devices(4, True))],
    ids=str,
)
def several(request: pytest.FixtureRequest, of_one: list[dict[str, float]]) -> Iterator[Several]:
    """A session of several trainers and engines, two steps old, and the metrics of those."""
    with RLSession.start(request.param.config) as session:
        yield session, learned(session)


@pytest.mark.slow
def test_several_trainers_learn_what_one_learns(
    several: Several, of_one: list[dict[str, float]]
) -> None:
    session, rows = several
    assert_close(rows, of_one)
    assert session.sync(verify=True).verified
    assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.slow
def test_each_trainer_and_each_engine_is_a_process_of_its_own(several: Several) -> None:
    stack = several[0].debug.stack
    pids = [p for answer in stack.trainers.ask("processes") for p in answer]
    pids += [answer[0] for answer in stack.engines.ask("processes")]
    ranks, engines = len(stack.layout.trainers), stack.layout.replicas
    assert len(set(pids)) == ranks + engines
    assert stack.layout.count == (ranks if stack.layout.colocate else ranks + engines)


@pytest.mark.slow
def test_an_error_of_one_rank_is_told_and_the_others_do_not_wait_for_it(several: Several) -> None:
    session, _ = several
    batch = session.advantages(session.score(session.generate()))
    last = batch.samples[-1]  # of the last rank: the first one never sees it
    spoiled = replace(last, tokens=[*last.tokens[:-1], 10**6])
    broken = replace(batch, samples=(*batch.samples[:-1], spoiled), id="broken")
    before, steps = digests(session), session.step_count
    with pytest.raises(StackError, match=r"update failed(.|\n)*index out of range"):
        session.update(broken)
    assert digests(session) == before
    assert session.step_count == steps
    session.snapshot("after")
    assert session.update(batch).applied
    assert session.sync(verify=True).verified
    session.restore("after")
    assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.slow
def test_an_interrupted_update_of_several_ranks_is_whole_or_not_made(several: Several) -> None:
    session, _ = several
    batch = large(session.advantages(session.score(session.generate())))
    seconds = session.update(batch).seconds
    for number, share in enumerate((0.2, 0.5)):
        before, steps = digests(session), session.step_count
        one = replace(batch, id=f"interrupted {number}")
        came = interrupted(lambda one=one: session.update(one), share * seconds)
        made = session.step_count - steps
        assert came or made
        assert (digests(session) != before) is bool(made)
    session.sync()
    assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.slow
@pytest.mark.parametrize("part", [SCHEDULER, *slow(0)])
def test_an_engine_that_dies_is_started_again_and_gets_the_weights(
    several: Several, part: int
) -> None:
    session, _ = several
    session.step()
    kill(of_engine(session, 1, part))
    assert len(session.generate()) == 128
    assert session.sync(verify=True).verified
    session.step()


@pytest.mark.slow
def test_an_engine_that_dies_under_a_sync_is_started_again(several: Several) -> None:
    session, _ = several
    session.step()
    timer = threading.Timer(0.02, of_engine(session, 1, SCHEDULER).kill)
    timer.start()
    for _ in range(5):
        session.sync()
    timer.join()
    assert session.sync(verify=True).verified


@pytest.mark.slow
def test_a_rank_that_dies_is_told_and_takes_the_others_with_it(several: Several) -> None:
    """The last one of this module: it ends the session."""
    session, _ = several
    batch = large(session.advantages(session.score(session.generate())))
    stack = session.debug.stack
    members = stack.watch.members(TRAINER)
    timer = threading.Timer(0.3, of_trainer(session).kill)
    timer.start()
    with pytest.raises(KitError, match=r"trainer(.|\n)*died(.|\n)*RLSession\.load"):
        update_for_ever(session, batch)
    timer.join()
    assert not any(process.is_running() for process in members)
    session.close()
