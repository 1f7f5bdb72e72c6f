"""The buffer of unfinished groups: first in, first out, and the same after a restart."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kit.data.buffer import Group, RolloutBuffer, unfinished
from kit.errors import DataError
from kit.samples import Sample, Status


def group(number: int, size: int = 2) -> Group:
    return tuple(
        Sample(
            group_index=number,
            index=i,
            prompt=[{"role": "user", "content": f"{number}?"}],
            tokens=[1, 2, number, 7, 8],
            response_length=3,
            rollout_log_probs=[-0.5, -1.25, -1e-7],
            weight_versions=[3, 5],
            version_lengths=[2, 1],
            loss_mask=[0, 0, 1],
            status=Status.ABORTED if i else Status.COMPLETED,
            metadata={"token_texts": ["a", "b", "\ud83d"], "level": {"x": [1, None]}},
        )
        for i in range(size)
    )


@given(st.lists(st.integers(0, 3) | st.lists(st.integers(0, 9), max_size=3).map(tuple)))
def test_what_waited_longest_is_taken_first_and_nothing_is_lost(
    moves: list[int | tuple[int, ...]],
) -> None:
    buffer, waiting = RolloutBuffer(), list[Group]()
    for move in moves:
        if isinstance(move, int):
            assert buffer.take(move) == waiting[:move]
            waiting = waiting[move:]
        else:
            buffer.put(map(group, move))
            waiting += map(group, move)
        assert len(buffer) == len(waiting)
    assert buffer.take(len(waiting) + 1) == waiting


def test_a_state_holds_everything_through_json() -> None:
    buffer = RolloutBuffer([group(4), group(1, size=3)])
    again = RolloutBuffer([group(9)])
    again.load_state(json.loads(json.dumps(buffer.state())))
    assert again.take(9) == [group(4), group(1, size=3)]
    assert len(buffer) == 2


@pytest.mark.parametrize("state", [7, [3], [[{"rewrad": 1}]], [[{"status": "lost"}]], ["ab"]])
def test_a_damaged_state_is_refused_and_changes_nothing(state: object) -> None:
    buffer = RolloutBuffer([group(4)])
    with pytest.raises(DataError):
        buffer.load_state(state)  # type: ignore[arg-type]
    assert buffer.take(9) == [group(4)]


def test_only_what_the_engine_could_go_on_with_is_unfinished() -> None:
    left = {status for status in Status if unfinished(Sample(status=status))}
    assert left == {Status.PENDING, Status.ABORTED}
