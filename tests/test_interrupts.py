"""What Ctrl-C must not cut in two."""

import signal
import threading

import pytest

from kit.interrupts import collected, held


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_an_interrupt_waits_for_the_end_of_what_is_held() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt, match="all is done"), held() as block:
        interrupt()
        done.append("the rest")
        block.said = "all is done"
    assert done == ["the rest"]
    with pytest.raises(KeyboardInterrupt):
        interrupt()  # as it was before


def test_what_is_to_stop_hears_of_it_at_once() -> None:
    heard: list[str] = []
    with pytest.raises(KeyboardInterrupt), held(lambda: heard.append("stop")):
        interrupt()
        assert heard == ["stop"]


def test_the_third_interrupt_is_let_through() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt, match="third"), held():
        interrupt()
        interrupt()
        reached.append("two")
        interrupt()
        reached.append("three")
    assert reached == ["two"]


def test_one_inside_another_waits_for_the_outer_end() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), held():
        with held():
            interrupt()
        done.append("outer")
    assert done == ["outer"]


def test_an_end_may_collect_what_was_kept_inside_and_holds_nothing_itself() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), collected():
        with held():
            interrupt()
        done.append("kept")
    assert done == ["kept"]
    with pytest.raises(KeyboardInterrupt), collected():
        interrupt()
        done.append("never")
    assert done == ["kept"]


def test_an_error_is_told_in_place_of_the_interrupt() -> None:
    with pytest.raises(ValueError, match="first"), held():
        interrupt()
        raise ValueError("first")


def test_in_another_thread_nothing_is_held() -> None:
    seen = []

    def work() -> None:
        with held(), collected():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]
