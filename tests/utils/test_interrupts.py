"""What Ctrl-C must not cut in two."""

import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from kit.utils.interrupts import collected, held, raised_again


def interrupt(times: int = 1) -> None:
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


def inside(around: Any, *work: Callable[[], object]) -> list[int]:
    """Do the work inside a block that ends in a KeyboardInterrupt: what of it was done."""
    done = []

    def all_of_it() -> None:
        with around:
            for number, part in enumerate(work):
                part()
                done.append(number)

    with pytest.raises(KeyboardInterrupt):
        all_of_it()
    return done


def test_an_interrupt_waits_for_the_end_of_what_is_held() -> None:
    assert inside(held(), interrupt, str) == [0, 1]
    with pytest.raises(KeyboardInterrupt):
        interrupt()  # as it was before


def test_it_says_what_the_block_has_to_say() -> None:
    def work() -> None:
        with held() as block:
            interrupt()
            block.said = "all is done"

    with pytest.raises(KeyboardInterrupt, match="all is done"):
        work()


def test_what_is_to_stop_hears_of_it_at_once() -> None:
    heard: list[str] = []
    inside(held(lambda: heard.append("stop")), interrupt, lambda: heard.append("end"))
    assert heard == ["stop", "end"]


def test_the_third_interrupt_is_let_through() -> None:
    assert inside(held(), lambda: interrupt(2), interrupt, str) == [0]


def test_one_inside_another_waits_for_the_outer_end() -> None:
    def inner() -> None:
        with held():
            interrupt()

    assert inside(held(), inner, str) == [0, 1]


def test_an_end_may_collect_what_was_kept_inside_and_holds_nothing_itself() -> None:
    def inner() -> None:
        with held():
            interrupt()

    assert inside(collected(), inner, str) == [0, 1]
    assert inside(collected(), interrupt, str) == []


def test_an_error_is_told_in_place_of_the_interrupt() -> None:
    def work() -> None:
        with held():
            interrupt()
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        work()


def test_in_another_thread_nothing_is_held() -> None:
    seen = []

    def work() -> None:
        with held(), collected():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


class Interrupted:
    """An object upon whose finalizer an interrupt comes."""

    def __del__(self) -> None:
        interrupt()


def test_one_that_comes_upon_a_finalizer_stops_what_was_going_on() -> None:
    def work() -> None:
        Interrupted()
        until = time.monotonic() + 60
        while time.monotonic() < until:
            pass

    begin = time.monotonic()
    assert inside(raised_again(), work, str) == []
    assert time.monotonic() - begin < 50
    with pytest.raises(KeyboardInterrupt):
        interrupt()  # as it was before


def test_one_that_comes_upon_a_finalizer_at_the_very_end_is_raised_there_and_once() -> None:
    assert inside(raised_again(), Interrupted) == [0]
    time.sleep(0.1)  # and not in here


def test_what_else_a_finalizer_raises_is_told_as_ever() -> None:
    class Failing:
        def __del__(self) -> None:
            raise ValueError("of a finalizer")

    told: list[str] = []
    before, sys.unraisablehook = sys.unraisablehook, lambda one: told.append(str(one.exc_value))
    try:
        with raised_again():
            Failing()
    finally:
        sys.unraisablehook = before
    assert told == ["of a finalizer"]
