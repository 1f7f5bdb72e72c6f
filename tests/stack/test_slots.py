"""Turns of sessions on a stack: one at a time, in order, given way where somebody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

from kit.stack.slots import Turns


def in_threads(*works: Callable[[], None]) -> list[BaseException]:
    """Run these side by side; what they raised."""
    failed: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return failed


def test_one_thread_has_the_turn_and_may_take_it_again_and_lend_it() -> None:
    turns, inside, done = Turns(), [0], list[int]()

    def work(number: int) -> None:
        for step in range(100):
            with turns.take() as again:
                assert not again
                inside[0] += 1
                assert inside[0] == 1
                with turns.take() as again:
                    assert again
                if step % 5 == number:
                    inside[0] -= 1
                    with turns.released():
                        assert not turns.is_mine()
                    inside[0] += 1
                assert inside[0] == 1
                assert turns.is_mine()
                done.append(number)
                inside[0] -= 1

    assert not in_threads(*(lambda n=n: work(n) for n in range(4)))  # type: ignore[misc]
    assert sorted(done) == [n for n in range(4) for _ in range(100)]
    assert not turns.is_mine()


def test_a_loop_lets_a_thread_in_that_waits() -> None:
    turns, waits, came = Turns(), threading.Event(), threading.Event()

    def loop() -> None:
        while not came.is_set():
            with turns.take():
                waits.wait(60)  # somebody stands behind the lock, or is about to

    def once() -> None:
        waits.set()
        with turns.take():
            came.set()

    assert not in_threads(loop, once)


def test_who_fails_gives_the_turn_back() -> None:
    turns = Turns()
    for _ in range(2):
        try:
            with turns.take() as again:
                assert not again
                raise ValueError
        except ValueError:
            assert not turns.is_mine()

    def once_more() -> None:
        with turns.take() as again:
            assert not again

    assert not in_threads(once_more)
