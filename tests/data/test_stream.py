"""The order of training rows: endless, from the seed, and the same after a restart."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data import PromptRow, PromptSet
from kit.data.stream import PromptStream
from kit.errors import DataError


def prompt_set(size: int, text: str = "q") -> PromptSet:
    return PromptSet("rows", [PromptRow(f"{text}{n}", str(n), {}, n + 1) for n in range(size)])


def take(stream: PromptStream, n: int) -> list[int]:
    return [row.number for row in stream.next(n)]


def test_every_epoch_has_each_row_once_in_an_order_of_its_own() -> None:
    stream = PromptStream(prompt_set(20), seed=3)
    first, second = take(stream, 20), take(stream, 20)
    assert sorted(first) == sorted(second) == list(range(1, 21))
    assert first != second
    assert stream.epoch == 2
    assert take(PromptStream(prompt_set(20), seed=3), 20) == first
    assert take(PromptStream(prompt_set(20), seed=4), 20) != first


def test_without_shuffling_rows_come_as_they_stand() -> None:
    assert take(PromptStream(prompt_set(3), shuffle=False), 7) == [1, 2, 3, 1, 2, 3, 1]


@given(
    size=st.integers(1, 9),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
    parts=st.lists(st.integers(0, 25), max_size=5),
    after=st.integers(0, 25),
)
def test_a_continued_stream_gives_what_an_unbroken_one_gives(
    size: int, seed: int, shuffle: bool, parts: list[int], after: int
) -> None:
    unbroken = PromptStream(prompt_set(size), seed, shuffle)
    expected = take(unbroken, sum(parts) + after)
    stopped = PromptStream(prompt_set(size), seed, shuffle)
    got = [number for n in parts for number in take(stopped, n)]
    continued = PromptStream(prompt_set(size), seed=seed + 1, shuffle=not shuffle)
    continued.load_state(json.loads(json.dumps(stopped.state())))
    assert got + take(continued, after) == expected


def test_a_look_ahead_shows_what_comes_next_and_takes_nothing() -> None:
    stream = PromptStream(prompt_set(5), seed=3)
    stream.next(3)
    before = stream.state()
    ahead = [row.number for row in stream.peek(9)]  # into the next epochs
    assert stream.state() == before
    assert take(stream, 9) == ahead


def test_a_state_of_other_data_is_refused_and_changes_nothing() -> None:
    stream = PromptStream(prompt_set(5), shuffle=False)
    stream.next(2)
    state = PromptStream(prompt_set(5, "other")).state()
    with pytest.raises(DataError, match="other prompts"):
        stream.load_state(state)
    with pytest.raises(DataError, match="lacks"):
        stream.load_state({"epoch": 0})
    with pytest.raises(DataError, match="damaged"):
        stream.load_state(stream.state() | {"position": 5})
    assert take(stream, 1) == [3]
