"""A time limit holds whatever a reward function does, in a cell and under a dashboard."""

from __future__ import annotations

import asyncio
import ctypes
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kit.rewards import score_samples
from kit.rewards.runner import score_each
from kit.rewards.timeouts import LIMIT, call_in_time
from kit.samples import Sample, Status
from tests.cases import slow

LIBC = ctypes.CDLL(None)


@pytest.fixture(autouse=True)
def short_limit() -> Iterator[None]:
    before, LIMIT.seconds = LIMIT.seconds, 1.0
    yield
    LIMIT.seconds = before


@pytest.fixture
def long_limit() -> None:
    """Of a minute: where nothing hangs, the first call may load math-verify."""
    LIMIT.seconds = 60.0


def samples(count: int = 3) -> list[Sample]:
    return [
        Sample(index=i, status=Status.COMPLETED, response=str(i), label="2") for i in range(count)
    ]


def in_a_thread(call: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join()
    return found[0]


def wait() -> None:
    threading.Event().wait()


def swallows(sample: Sample) -> float:
    try:
        if sample.index == 1:
            wait()
    except Exception:
        return 0.0
    return 1.0


def swallows_all(sample: Sample) -> float:
    try:
        if sample.index == 1:
            wait()
    except:  # noqa: E722
        return 0.0
    return 1.0


def tries_again(sample: Sample) -> float:
    for _ in range(3):
        try:
            if sample.index == 1:
                wait()
        except BaseException:
            continue
    return 1.0


def tries_for_ever(sample: Sample) -> float:
    while sample.index == 1:
        try:
            wait()
        except BaseException:
            continue
    return 1.0


def sets_an_alarm(sample: Sample) -> float:
    signal.signal(signal.SIGALRM, signal.SIG_IGN)
    signal.alarm(1)
    signal.alarm(0)
    if sample.index == 1:
        wait()
    return 1.0


def backtracks(sample: Sample) -> float:
    return float(
        re.match("(a+)+$", "a" * 60 + "b" * sample.index if sample.index == 1 else "a") is not None
    )


def verifies(sample: Sample) -> float:
    from math_verify import parse, verify

    return float(verify(parse(f"${sample.label}$"), parse(f"${sample.response}$")))


def verifies_and_waits(sample: Sample) -> float:
    reward = verifies(sample)
    if sample.index == 1:
        wait()
    return reward + 1.0


def verifies_or_else(sample: Sample) -> float:
    try:
        return verifies(sample)
    except Exception:
        return 0.0


def locks_twice(sample: Sample) -> float:
    mutex = ctypes.create_string_buffer(64)
    for _ in range(2 if sample.index >= 1 else 1):
        LIBC.pthread_mutex_lock(mutex)  # looks at no signals
    return 1.0


@pytest.mark.parametrize(
    "function",
    [
        swallows,
        tries_for_ever,
        backtracks,
        *slow(verifies_and_waits, swallows_all, tries_again, sets_an_alarm),
    ],
)
def test_a_function_is_ended_in_the_main_thread_and_fails_by_its_time(
    function: Callable[..., Any], recwarn: pytest.WarningsRecorder
) -> None:
    verifies(samples()[0])  # what it imports is not within the time limit

    scored = score_samples(samples(), function)
    assert [s.reward is None for s in scored] == [False, True, False]
    assert scored[1].status is Status.FAILED
    assert "reward.timeout" in str(scored[1].error)
    assert not [w for w in recwarn if "process of its own" in str(w.message)]


@pytest.mark.parametrize("function", [swallows, *slow(swallows_all)])
def test_a_function_is_ended_under_a_dashboard_and_fails_by_its_time(
    function: Callable[..., Any],
) -> None:
    def fresh(sample: Sample) -> float:
        return float(function(sample))

    with pytest.warns(RuntimeWarning, match="process of its own"):  # a wait for a lock
        scored = in_a_thread(lambda: score_samples(samples(), fresh))
    assert [s.reward for s in scored] == [1.0, None, 1.0]
    assert "reward.timeout" in str(scored[1].error)


def test_code_that_no_exception_reaches_moves_to_a_process_and_is_ended_there() -> None:
    with pytest.warns(RuntimeWarning, match=r"locks_twice did not end .* process of its own"):
        scored = in_a_thread(lambda: score_samples(samples(3), locks_twice))
    assert [s.reward for s in scored] == [1.0, None, None]
    assert all("reward.timeout" in str(s.error) for s in scored[1:])
    assert [s.reward for s in score_samples(samples(1), locks_twice)] == [1.0]


@pytest.mark.usefixtures("long_limit")
@pytest.mark.parametrize("function", [verifies, verifies_or_else])
def test_a_function_that_needs_the_main_thread_gets_one_under_a_dashboard(
    function: Callable[..., Any],
) -> None:
    assert [s.reward for s in score_samples(samples(), function)] == [0.0, 0.0, 1.0]
    with pytest.warns(RuntimeWarning, match=f"{function.__name__} needs a main thread"):
        scored = in_a_thread(lambda: score_samples(samples(), function))
    assert [s.reward for s in scored] == [0.0, 0.0, 1.0]


@pytest.mark.usefixtures("long_limit")
def test_an_async_function_that_needs_the_main_thread_gets_one() -> None:
    async def judge(sample: Sample) -> float:
        return verifies_or_else(sample)

    async def judge_all(samples: list[Sample]) -> list[float]:
        return [verifies_or_else(sample) for sample in samples]

    for function in (judge, judge_all):
        with pytest.warns(RuntimeWarning, match="needs a main thread"):
            scored = score_samples(samples(), function)
        assert [s.reward for s in scored] == [0.0, 0.0, 1.0]


def test_an_async_function_that_waits_without_await_fails_alone_and_moves() -> None:
    async def judge(sample: Sample) -> float:
        if sample.index == 1:
            wait()
        await asyncio.sleep(0)
        return 1.0

    with pytest.warns(RuntimeWarning, match="judge did not end"):
        scored = score_samples(samples(), judge)
    assert [s.reward for s in scored] == [1.0, None, 1.0]
    assert "reward.timeout" in str(scored[1].error)


@pytest.mark.slow
def test_an_async_function_of_all_samples_that_waits_without_await_is_ended() -> None:
    async def judge(samples: list[Sample]) -> list[float]:
        if len(samples) > 1:
            wait()
        return [1.0] * len(samples)

    with pytest.warns(RuntimeWarning, match="judge did not end"):
        scored = score_samples(samples(2), judge)
    assert [s.reward for s in scored] == [None, None]
    assert [s.reward for s in score_samples(samples(1), judge)] == [1.0]


def test_the_time_of_a_function_of_all_samples_holds_while_it_yields() -> None:
    def judge(samples: list[Sample]) -> Iterator[float]:
        yield 1.0
        wait()

    assert "reward.timeout" in str(score_samples(samples(1), judge)[0].error)


@pytest.mark.usefixtures("long_limit")
def test_a_function_that_cannot_be_sent_to_a_process_is_told_so_and_gives_no_wrong_reward() -> None:
    lock = threading.Lock()

    def judge(sample: Sample) -> float:
        with lock:
            return verifies_or_else(sample)

    with pytest.warns(RuntimeWarning, match="cannot be sent to a process of its own.*lock"):
        scored = in_a_thread(lambda: score_samples(samples(), judge))
    assert [s.reward for s in scored] == [None] * 3
    assert "needs a main thread" in str(scored[2].error)


@pytest.mark.usefixtures("long_limit")
def test_a_moved_function_prints_fails_and_dies_as_in_the_notebook(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def judge(sample: Sample) -> float:
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        print("sample", sample.index)
        if sample.index == 1:
            return float("not a number")
        if sample.index == 2:
            os._exit(3)
        return 1.0

    with pytest.warns(RuntimeWarning, match="needs a main thread"):
        scored = in_a_thread(lambda: score_each(samples(4), judge))
    assert [one.sample.reward for one in scored] == [1.0, None, None, 1.0]
    assert "(line 5 of reward function)" in str(scored[1].sample.error)
    assert "exit code 3" in str(scored[2].sample.error)
    assert "sample 3" in capsys.readouterr().out


def test_a_call_within_a_call_leaves_the_outer_one_its_time() -> None:
    def outer(_: None) -> float:
        call_in_time(lambda _: wait(), None, 30.0)
        wait()
        return 1.0

    outcome = call_in_time(outer, None, 0.3)
    assert "within 0.3 s" in str(outcome.exception)


def test_an_import_is_not_ended_in_its_middle(tmp_path: Path) -> None:
    (tmp_path / "a_large_library.py").write_text(
        "import time\nuntil = time.monotonic() + 2.5\nwhile time.monotonic() < until:\n    pass\n"
    )

    def load(folder: Path) -> float:
        sys.path.insert(0, str(folder))
        try:
            import a_large_library

            own = time.monotonic() + 0.7
            while time.monotonic() < own:
                pass
            return float(a_large_library.until > 0)
        finally:
            sys.path.remove(str(folder))
            del sys.modules["a_large_library"]

    # Beside other work a second may pass between two lines.
    assert call_in_time(load, tmp_path, 2.0).value == 1.0
    assert in_a_thread(lambda: call_in_time(load, tmp_path, 2.0)).value == 1.0


def test_what_was_interrupted_is_not_ended_later() -> None:
    def interrupted(_: None) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call_in_time(interrupted, None, 0.1)
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        pass


def test_nothing_is_ended_while_a_debugger_is_attached() -> None:
    def traced(_: None) -> float:
        sys.settrace(lambda *_: None)
        until = time.monotonic() + 0.5
        while time.monotonic() < until:
            pass
        sys.settrace(None)
        return 1.0

    assert call_in_time(traced, None, 0.1).value == 1.0
