"""Packing loses no token, and micro-batches lose no sample."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.errors import DataError
from kit.model.packing import micro_batches, pack

# Tokens of a sample and how many of them are its response: at least one comes before.
samples = st.lists(
    st.lists(st.integers(0, 151_935), min_size=1, max_size=9).flatmap(
        lambda row: st.tuples(st.just(row), st.integers(0, len(row) - 1))
    ),
    min_size=1,
    max_size=6,
)
sizes = st.lists(st.integers(1, 40), max_size=30)


@given(samples)
def test_every_sample_can_be_read_back_from_the_row(samples: list[tuple[list[int], int]]) -> None:
    packed = pack([row for row, _ in samples], [count for _, count in samples])
    assert packed.lengths == tuple(len(row) for row, _ in samples)
    parts = packed.tokens_T.split(packed.lengths)
    assert [part.tolist() for part in parts] == [row for row, _ in samples]
    for part in packed.position_T.split(packed.lengths):
        assert part.tolist() == list(range(len(part)))


@given(samples)
def test_every_response_token_is_predicted_from_the_token_before_it_in_its_own_sample(
    samples: list[tuple[list[int], int]],
) -> None:
    packed = pack([row for row, _ in samples], [count for _, count in samples])
    expected = [
        (token, i, place)
        for i, (row, count) in enumerate(samples)
        for place, token in enumerate(row)
        if place >= len(row) - count
    ]
    owner_T = torch.repeat_interleave(torch.arange(len(samples)), torch.tensor(packed.lengths))
    assert packed.target_R.tolist() == [token for token, _, _ in expected]
    assert packed.sample_R.tolist() == [i for _, i, _ in expected]
    assert owner_T[packed.predictor_R].tolist() == [i for _, i, _ in expected]
    places = packed.position_T[packed.predictor_R] + 1
    assert places.tolist() == [place for _, _, place in expected]


@pytest.mark.parametrize(("row", "count"), [([5, 6], 2), ([5, 6], 3), ([], 0)])
def test_a_response_without_a_token_before_it_is_refused_by_its_place(
    row: list[int], count: int
) -> None:
    with pytest.raises(DataError, match=f"Sample 1 .* has {len(row)} tokens, {count} of them"):
        pack([[1, 2, 3], row], [1, count])


@given(sizes, st.integers(1, 100))
def test_micro_batches_hold_every_sample_once_within_the_limit(
    sizes: list[int], limit: int
) -> None:
    bins = micro_batches(sizes, limit)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    for members in bins:
        assert members
        assert sum(sizes[i] for i in members) <= limit or len(members) == 1


@given(sizes, st.integers(40, 100))
def test_no_two_micro_batches_would_have_fitted_into_one(sizes: list[int], limit: int) -> None:
    totals = sorted(sum(sizes[i] for i in members) for members in micro_batches(sizes, limit))
    assert len(totals) < 2 or totals[0] + totals[1] > limit


def test_samples_are_laid_where_they_first_fit_in_order_of_falling_length() -> None:
    assert micro_batches([3, 7, 5, 2, 9], 10) == [[4], [0, 1], [2, 3]]
