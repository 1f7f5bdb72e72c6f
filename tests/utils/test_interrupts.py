"""What Ctrl-C must not cut in two."""

import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from kit.utils.interrupts import collected, held


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
