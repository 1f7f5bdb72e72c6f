"""Forks: several sessions on one stack, each as if it were alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.errors import DataError, KitError, SessionError
from kit.lifecycle.train_loop import Training
from kit.samples import Sample
from tests.conftest import Shared
from tests.faults.interrupts import interrupted
from tests.forking import CONFIG, OTHER, alone, digest, everything, samples


@pytest.fixture(scope="module")
def expected(shared: Shared) -> list[tuple[Any, ...]]:
    """What two sessions give that have a stack to themselves."""
    shared.at(seed=0).close(keep_warm=True)
    other = CONFIG.replace("seed", 5).replace("training.learning_rate", 3e-3)
    return [alone(CONFIG, 3), alone(other, 3, **OTHER)]


@pytest.fixture(scope="module")
def running(expected: list[tuple[Any, ...]]) -> Iterator[RLSession]:
    """A session that trains adapters, on the same processes."""
    session = RLSession.start(CONFIG)
    session.snapshot("first")
    yield session
    session.close(keep_warm=True)


@pytest.fixture
def root(running: RLSession) -> Iterator[RLSession]:
    """It in its first moment, without forks."""
    running.restore("first")
    yield running
    for fork in running.forks.values():
        fork.close()


def test_forks_trained_in_turns_give_bit_for_bit_what_each_gives_alone(
    expected: list[tuple[Any, ...]], root: RLSession
) -> None:
    fork = root.fork("other", fresh=True, seed=5, learning_rate=3e-3, **OTHER)
    assert (fork.step_count, fork.history, fork.name) == (0, [], "other")
    for number in range(3):
        root.step()
        fork.step()
        if number == 1:  # what must leave no trace
            fork.snapshot("here")
            root.what_if(lr=[1e-2])
            fork.evaluate()
            assert root.check().healthy
            fork.step()
            assert fork.check_mismatch(fork.generate(), deep=True).verdict == "pass"
            fork.restore("here")
    assert everything(root) == expected[0]
    assert everything(fork) == expected[1]


def test_a_fork_goes_on_as_its_parent_would_have(root: RLSession) -> None:
    root.step()
    before = everything(root)
    twin, faster = root.fork("twin"), root.fork("faster", learning_rate=5e-3)
    assert everything(twin)[:3] == before[:3]
    assert faster.config.training.learning_rate == 5e-3
    assert faster.config.name == "adapters.faster"
    twin.step()
    faster.step()
    assert everything(root) == before
    root.step()
    assert everything(twin) == everything(root)
    assert samples(faster) == samples(root)  # of the same weights, prompts and seeds
    assert digest(faster) != digest(root)
    assert len({s.weight_version for s in (root, twin, faster)}) == 3


def test_nobody_samples_from_the_weights_of_another(root: RLSession) -> None:
    a, b = root.fork("a"), root.fork("b", {"rollout.temperature": 0.5}, learning_rate=3e-2)
    b.train(3, show=False)
    a.update(a.advantages(a.score(a.generate())))  # and no sync: somebody else is next
    written = b.generate(["1+2="], n_samples_per_prompt=2)
    assert written.written_by({b.weight_version})
    assert written[0].temperature == 0.5
    for session in (a, b, root):
        rollout = session.generate()
        assert rollout.written_by({session.weight_version})
        report = session.check_mismatch(rollout)
        assert report.verdict == "pass", (session, report)
    assert root.sync(verify=True).verified
    assert b.check_mismatch(b.generate()).verdict == "pass"
    foreign = a.check_mismatch(rollout)  # the root's: of other weights, whatever they are
    assert foreign.cause_kind == "stale_weights"


def test_two_threads_take_turns_and_nothing_mixes(root: RLSession) -> None:
    a, b = root.fork("a"), root.fork("b", learning_rate=3e-3, seed=9)
    failed: list[BaseException] = []

    def steps(session: RLSession) -> None:
        try:
            for _ in range(2):
                session.step()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=steps, args=(session,)) for session in (a, b)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    once_more = root.fork("c", learning_rate=3e-3, seed=9)
    steps(root)
    steps(once_more)
    assert everything(a) == everything(root)
    assert everything(b) == everything(once_more)


def test_a_callback_may_use_another_session_and_a_reward_in_its_turn(root: RLSession) -> None:
    judge = root.fork("judge")
    root.train(2, callbacks=lambda _: judge.step(), show=False)
    assert (root.step_count, judge.step_count) == (2, 2)
    assert everything(judge)[:3] == everything(root)[:3]

    def judged(sample: Sample) -> float:
        return float(len(judge.generate([sample.response or "1"], n_samples_per_prompt=1)))

    assert all(s.reward == 1.0 for s in root.score(root.generate(), reward=judged))
    failed = root.collect(reward=judged).failed()
    assert len(failed) == 16
    assert "asked for something while the engine writes for 'adapters'" in (failed[0].error or "")


def test_rewards_have_the_time_of_their_own_session_after_another_had_its_turn(
    root: RLSession,
) -> None:
    hasty = root.fork("hasty", {"reward.timeout": 0.05})

    def judged(sample: Sample) -> float:
        if sample.index == 0:
            hasty.generate(["1+2="], n_samples_per_prompt=1)
        else:
            time.sleep(0.2)
        return 1.0

    rollout = root.generate(["1+2="], n_samples_per_prompt=2)
    assert not root.score(rollout, reward=judged).failed()


def test_undo_and_snapshots_are_each_sessions_own(root: RLSession) -> None:
    fork = root.fork("fork")
    root.snapshot("mine")
    fork.step()
    fork.snapshot("mine")
    there = digest(fork)
    fork.step()
    root.step()
    with pytest.raises(SessionError, match="first"):
        fork.restore("first")
    fork.restore("mine")
    assert digest(fork) == there
    assert root.step_count == 1
    root.restore("mine")
    assert root.step_count == 0
    assert digest(fork) == there


def test_a_forks_checkpoint_goes_into_any_session_of_the_stack(
    root: RLSession, tmp_path: Path
) -> None:
    fork = root.fork("fork", learning_rate=3e-3)
    fork.step()
    path, there = fork.save(tmp_path / "saved"), everything(fork)
    fork.step()
    further = everything(fork)
    other = root.fork("other")
    other.restore(path)
    assert everything(other)[:3] == there[:3]
    other.step()
    assert everything(other) == further
    assert root.step_count == 0


def test_a_closed_fork_leaves_the_others_and_its_name(root: RLSession) -> None:
    fork, other = root.fork("fork"), root.fork("other")
    fork.step()
    assert set(root.forks) == set(fork.forks) == {"fork", "other"}
    assert root.forks["other"] is other
    fork.close()
    fork.close()
    assert set(root.forks) == {"other"}
    with pytest.raises(SessionError, match=r"(?s)'adapters.fork' is closed.*fork 'adapters' again"):
        fork.step()
    assert root.step().step == other.step().step == 0
    again = other.fork("fork")
    assert again.step_count == 1
    assert "fork of 'adapters'" in repr(again)
    assert everything(again)[:3] == everything(other)[:3]


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("a b", {}, "cannot be the name of a fork"),
        ("x", {"settings": {"model.dtype": "bfloat16"}}, "same for all forks of a stack"),
        ("x", {"num_trainers": 2}, "same for all forks of a stack"),
        ("x", {"settings": {"reward.name": "math"}}, "reward="),
        ("x", {"settings": {"data.source": "tiny:chain"}}, "data="),
        ("x", {"learning_rte": 1}, "Did you mean"),
        ("x", {"learning_rate": -1.0}, "learning_rate"),
        ("x", {"advantage_estimator": "ppo"}, "has a critic"),
        ("x", {"reward": "exat"}, "exact"),
    ],
)
def test_what_a_fork_cannot_be_is_refused_and_changes_nothing(
    root: RLSession, name: str, given: dict[str, Any], says: str
) -> None:
    before = everything(root)
    with pytest.raises(KitError, match=says):
        root.fork(name, **given)
    assert not root.forks
    assert everything(root) == before


def test_full_training_cannot_be_forked() -> None:
    with pytest.raises(SessionError, match=r"(?s)trains all weights.*tiny-lora.*what_if"):
        RLSession("tiny").fork("x")


def test_several_generate_in_one_call_what_each_would_have_generated(root: RLSession) -> None:
    fork, other = root.fork("fork", seed=7), root.fork("other")
    other.generate()
    expected = samples(other)
    first, second = RLSession.generate_together([fork, root])
    assert (fork.last_rollout, root.last_rollout) == (first, second)
    assert samples(root) == expected != samples(fork)
    with pytest.raises(SessionError, match="named twice"):
        RLSession.generate_together([root, root])
    with pytest.raises(SessionError, match="No session is named"):
        RLSession.generate_together([])
    with pytest.raises(SessionError, match="pass sessions that share a stack"):
        RLSession.generate_together(root)  # type: ignore[arg-type]
    prompts: Any = iter(["1+2=", "3+4="])
    both = RLSession.generate_together([fork, root], prompts, n_samples_per_prompt=1)
    assert [len(rollout) for rollout in both] == [2, 2]
    with pytest.raises(DataError, match="needs a list of prompts"):
        root.generate(iter([]))  # type: ignore[arg-type]
    with pytest.raises(SessionError):
        RLSession.attach(forks={"fork": None})
    fork.close()
    with pytest.raises(SessionError, match="closed"):
        RLSession.generate_together([root, fork])


def test_an_interrupt_in_one_session_leaves_all_of_them_in_order(root: RLSession) -> None:
    fork, twin, other = root.fork("fork"), root.fork("twin"), root.fork("other")
    undone = 0
    for after in (0.02, 0.1, 0.2, 0.4):
        interrupted(lambda: RLSession.generate_together([other, root]), after)
        before = everything(fork)
        if interrupted(fork.step, after) and fork.step_count == before[0]:
            undone += 1
            now = everything(fork)
            assert (now[1:3], now[4]) == (before[1:3], before[4])
    assert undone
    while twin.step_count < fork.step_count:
        twin.step()
    assert everything(twin)[1:3] == everything(fork)[1:3]
    for session in (root, fork, twin, other):
        assert session.check_mismatch(session.generate()).verdict == "pass"


def test_a_fork_trains_in_the_background_beside_others_and_ends_with_its_close(
    root: RLSession,
) -> None:
    fork = root.fork("fork")
    training = Training(fork.debug, fork.step, 1000)
    fork.debug.lock.training = training
    training.resume()
    while not training.done:
        root.step()
    with pytest.raises(SessionError, match="while training runs"):
        fork.generate()
    assert root.check_mismatch(root.generate()).verdict == "pass"
    fork.close()
    assert training.state == "stopped"
    assert root.step()


def test_a_reward_that_asks_a_fork_and_a_thread_that_trains_it_never_wait_for_each_other(
    root: RLSession,
) -> None:
    judge = root.fork("judge")
    rollout = root.generate(["1+2=", "3+4="], n_samples_per_prompt=4)
    done, failed = threading.Event(), list[BaseException]()

    def judged(sample: Sample) -> float:
        return float(len(judge.generate([sample.response or "1"], n_samples_per_prompt=1)))

    def train() -> None:
        try:
            while not done.is_set():
                judge.step()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    scored = root.score(rollout, reward=judged)
    done.set()
    thread.join()
    assert not failed
    assert [sample.reward for sample in scored] == [1.0] * 8
    assert root.check_mismatch(rollout).verdict == "pass"
    assert judge.check_mismatch(judge.generate()).verdict == "pass"
