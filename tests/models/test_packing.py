"""Packing loses no token, and micro-batches lose no sample."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kit.errors import DataError
from kit.models import attention
from kit.models.packing import Packed, fit, micro_batches, pack

# Tokens of a sample and how many of them are its response: at least one comes before.
samples = st.lists(
    st.lists(st.integers(0, 151_935), min_size=1, max_size=9).flatmap(
        lambda row: st.tuples(st.just(row), st.integers(0, len(row) - 1))
    ),
    min_size=1,
    max_size=6,
)
sizes = st.lists(st.integers(1, 40), max_size=30)
groups = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=6),  # a prompt
        st.lists(st.lists(st.integers(0, 9), max_size=5), min_size=1, max_size=4),  # responses
    ),
    min_size=1,
    max_size=4,
)
Groups = list[tuple[list[int], list[list[int]]]]


def flat(groups: Groups) -> tuple[list[list[int]], list[int]]:
    """Tokens and response lengths of all samples."""
    pairs = [(prompt, response) for prompt, responses in groups for response in responses]
    return [prompt + response for prompt, response in pairs], [len(r) for _, r in pairs]


def seen(packed: Packed) -> list[tuple[list[int], list[int]]]:
    """What each sequence sees: tokens and positions."""
    rows = packed.seen_rows
    if rows is None:
        rows = torch.arange(len(packed.tokens_T))
    parts = rows.split(packed.seen_lengths)
    return [(packed.tokens_T[p].tolist(), packed.position_T[p].tolist()) for p in parts]


@given(groups, st.booleans())
def test_every_token_sees_itself_and_all_before_it_in_its_sample(
    groups: Groups, share: bool
) -> None:
    tokens, counts = flat(groups)
    packed = pack(tokens, counts, share=share)
    beginnings = {tuple(row[: i + 1]) for row in tokens for i in range(len(row))}
    first, found = 0, Counter[tuple[int, ...]]()
    for (row, positions), own in zip(seen(packed), packed.own_lengths, strict=True):
        assert positions == list(range(len(row)))
        assert row[len(row) - own :] == packed.tokens_T[first : first + own].tolist()
        first += own
        found.update(tuple(row[: i + 1]) for i in range(len(row) - own, len(row)))
    assert first == len(packed.tokens_T)
    assert set(found) == beginnings


@given(groups)
def test_every_beginning_is_in_the_row_once(groups: Groups) -> None:
    tokens, counts = flat(groups)
    beginnings = {tuple(row[: i + 1]) for row in tokens for i in range(len(row))}
    assert len(pack(tokens, counts).tokens_T) == len(beginnings)
    assert len(pack(tokens, counts, share=False).tokens_T) == sum(map(len, tokens))


def test_what_is_shared_and_what_is_not() -> None:
    packed = pack([[1, 2, 3, 7], [5, 6], [1, 2, 3, 7, 9], [3, 4], [1, 2, 3, 7]], [1, 1, 2, 0, 1])
    assert packed.tokens_T.tolist() == [1, 2, 3, 7, 5, 6, 9, 3, 4]
    assert packed.own_lengths == (3, 1, 2, 1, 2)
    assert packed.seen_lengths == (3, 4, 2, 5, 2)
    assert packed.seen_rows is not None
    assert packed.seen_rows.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 6, 7, 8]
    assert packed.predictor_R.tolist() == [2, 4, 2, 3, 2]
    assert packed.target_R.tolist() == [7, 6, 7, 9, 7]
    assert pack([[1, 2], [3, 4]], [1, 1]).seen_rows is None


@given(samples, st.booleans())
def test_every_response_token_is_predicted_from_the_token_before_it_in_its_own_sample(
    samples: list[tuple[list[int], int]], share: bool
) -> None:
    rows = [row for row, _ in samples]
    packed = pack(rows, [count for _, count in samples], share=share)
    expected = [
        (token, i, place)
        for i, (row, count) in enumerate(samples)
        for place, token in enumerate(row)
        if place >= len(row) - count
    ]
    assert packed.target_R.tolist() == [token for token, _, _ in expected]
    assert packed.sample_R.tolist() == [i for _, i, _ in expected]
    ends = torch.tensor(packed.own_lengths).cumsum(0).tolist()
    beginnings = []
    for row in packed.predictor_R.tolist():
        sequence = next(i for i, end in enumerate(ends) if row < end)
        whole, _ = seen(packed)[sequence]
        beginnings.append(whole[: len(whole) - (ends[sequence] - row - 1)])
    assert beginnings == [rows[i][:place] for _, i, place in expected]


@pytest.mark.parametrize(("row", "count"), [([5, 6], 2), ([5, 6], 3), ([], 0)])
def test_a_response_without_a_token_before_it_is_refused_by_its_place(
    row: list[int], count: int
) -> None:
    with pytest.raises(DataError, match=f"Sample 1 .* has {len(row)} tokens, {count} of them"):
        pack([[1, 2, 3], row], [1, count])


@given(groups, st.integers(1, 60))
def test_micro_batches_hold_every_sample_once_within_the_limit(groups: Groups, limit: int) -> None:
    tokens, counts = flat(groups)
    bins = micro_batches(tokens, counts, limit)
    assert sorted(i for members in bins for i in members) == list(range(len(tokens)))
    for members in bins:
        packed = pack([tokens[i] for i in members], [counts[i] for i in members])
        assert len(packed.tokens_T) <= limit or len(members) == 1


def test_samples_of_one_prompt_stay_together_where_they_fit() -> None:
    one, other = [1, 2, 3, 4, 5, 6], [9, 8, 7, 6, 5, 4]
    tokens = [[*one, 7], [*other, 7], [*one, 7, 8], [*other, 7, 8]]
    assert micro_batches(tokens, [1, 1, 2, 2], 10) == [[0, 2], [1, 3]]
    assert micro_batches(tokens, [1, 1, 2, 2], 20) == [[0, 1, 2, 3]]
    assert micro_batches(tokens, [1, 1, 2, 2], 8) == [[2], [3], [0], [1]]


@given(sizes, st.integers(1, 100))
def test_bins_hold_every_size_once_within_the_limit(sizes: list[int], limit: int) -> None:
    bins = fit(sizes, limit)
    assert sorted(i for members in bins for i in members) == list(range(len(sizes)))
    for members in bins:
        assert members
        assert sum(sizes[i] for i in members) <= limit or len(members) == 1


@given(sizes, st.integers(40, 100))
def test_no_two_bins_would_have_fitted_into_one(sizes: list[int], limit: int) -> None:
    totals = sorted(sum(sizes[i] for i in members) for members in fit(sizes, limit))
    assert len(totals) < 2 or totals[0] + totals[1] > limit


def test_sizes_are_laid_where_they_first_fit_in_falling_order() -> None:
    assert fit([3, 7, 5, 2, 9], 10) == [[4], [0, 1], [2, 3]]


@pytest.mark.parametrize("share", [False, True])
def test_layers_with_a_state_get_the_same_sequences_by_the_layouts_of_both_devices(
    share: bool,
) -> None:
    samples = [[5, 6, 7, 8, 9], [5, 6, 7, 3], [1, 2, 3, 4, 4, 4]]
    packed = pack(samples, [2, 1, 3], share=share)
    cpu = torch.device("cpu")
    layouts = attention.layout(packed, cpu), attention.gathered(packed, cpu)
    (rows, own), (rows_there, own_there) = map(attention.rectangle, layouts)
    assert torch.equal(rows, rows_there)
    assert torch.equal(own, own_there)
    seen = [
        packed.tokens_T[row[:length]].tolist()
        for row, length in zip(rows, packed.seen_lengths, strict=True)
    ]
    assert all(any(sample[: len(s)] == s for sample in samples) for s in seen)
    assert torch.equal(packed.tokens_T[rows].flatten()[own], packed.tokens_T)
