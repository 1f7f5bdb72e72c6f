"""Samples that several versions of the weights wrote: whose is a token, and does it train?"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kit.errors import DataError
from kit.rollout.collector import further_prompts
from kit.rollout.sampler import stop_over_seam
from kit.samples import Rollout, Sample
from kit.viz.samples.sample import sample_facts

PROMPT = [5, 6, 7]
parts = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), max_size=5)
"""(weight version, tokens it wrote), in the order of writing."""


def written(spans: list[tuple[int, int]]) -> tuple[Sample, list[int]]:
    """A sample made by these spans, and the version of each of its response tokens."""
    sample, owners = Sample(tokens=PROMPT), list[int]()
    for version, count in spans:
        first = len(owners)
        tokens = list(range(100 + first, 100 + first + count))
        sample = sample.continued(tokens, [-float(t) for t in tokens], version)
        owners += [version] * count
    return sample, owners


@given(parts)
def test_every_token_keeps_its_writer_and_its_log_prob(spans: list[tuple[int, int]]) -> None:
    sample, owners = written(spans)
    assert [version for version, count in sample.spans for _ in range(count)] == owners
    assert sample.tokens == PROMPT + list(range(100, 100 + len(owners)))
    assert sample.response_length == len(owners)
    assert sample.rollout_log_probs == [-float(t) for t in sample.response_tokens] or not spans
    assert all(a[0] != b[0] for a, b in zip(sample.spans, sample.spans[1:], strict=False))
    assert Sample.from_dict(json.loads(json.dumps(sample.to_dict()))) == sample


def test_a_sample_of_one_version_says_no_more_than_before() -> None:
    sample, _ = written([(4, 2), (4, 3)])
    assert (sample.weight_versions, sample.version_lengths) == ([4], [])
    assert sample.spans == [(4, 5)]
    nothing, _ = written([(4, 0)])
    assert (nothing.weight_versions, nothing.spans) == ([4], [])


@given(parts, st.integers(0, 3), st.data())
def test_only_what_the_named_weights_wrote_trains_and_a_mask_only_shrinks(
    spans: list[tuple[int, int]], version: int, data: st.DataObject
) -> None:
    sample, owners = written(spans)
    size = len(owners)
    mask = data.draw(st.none() | st.lists(st.integers(0, 1), min_size=size, max_size=size))
    masked = replace(sample, loss_mask=mask).masked_to(version)
    before = mask if mask is not None else [1] * size
    assert masked.mask == [m * (o == version) for m, o in zip(before, owners, strict=True)]


def test_what_is_continued_trains_even_if_its_beginning_does_not() -> None:
    sample, _ = written([(1, 2)])
    later = replace(sample, loss_mask=[0, 0]).continued([9], [-1.0], 2)
    assert later.loss_mask == [0, 0, 1]


def test_a_response_of_unknown_origin_is_not_continued() -> None:
    with pytest.raises(DataError, match="cannot be continued"):
        Sample(tokens=[1, 2], response_length=1).continued([3], [-1.0], 0)


@pytest.mark.parametrize(
    ("versions", "lengths"),
    [([1], [2]), ([1, 2], [3]), ([1, 2], [3, 0]), ([], [3]), ([1, 2], [2, 2])],
)
def test_lengths_that_do_not_fit_the_response_are_refused_with_the_numbers(
    versions: list[int], lengths: list[int]
) -> None:
    with pytest.raises(DataError, match="3 response tokens") as caught:
        Sample(
            tokens=[1, 2, 3], response_length=3, weight_versions=versions, version_lengths=lengths
        )
    assert str(lengths) in str(caught.value)


def test_a_sample_shows_who_wrote_how_much_of_it() -> None:
    assert dict(sample_facts(written([(3, 1), (5, 2)])[0]))["weights"] == (
        "version 3 (1 token), 5 (2 tokens)"
    )
    assert dict(sample_facts(written([(3, 4)])[0]))["weights"] == "version 3"


def test_a_rollout_can_be_reduced_to_what_one_version_wrote() -> None:
    both, old, new = (written(s)[0] for s in ([(1, 2), (2, 1)], [(1, 2)], [(2, 2)]))
    assert Rollout([both, old, new]).of_version(2).samples == (new,)


letters = st.lists(st.text("ab<", min_size=1, max_size=2), max_size=5)


@given(letters, letters, st.lists(st.text("ab<", min_size=1, max_size=3), max_size=2))
def test_a_stop_string_over_the_seam_ends_the_response_where_it_is_complete(
    before: list[str], after: list[str], stops: list[str]
) -> None:
    old = "".join(before)
    assume(not any(stop in old for stop in stops))  # the engine would have ended it there
    ends = [
        count
        for count in range(1, len(after) + 1)
        for stop in stops
        if 0 <= (old + "".join(after[:count])).find(stop) < len(old)
    ]
    assert stop_over_seam(before, after, stops) == min(ends, default=0)


@given(st.integers(1, 64), st.integers(0, 64), st.integers(0, 64), st.integers(1, 64))
def test_further_draws_are_never_empty_nor_more_than_a_batch(
    missing: int, kept: int, dropped: int, most: int
) -> None:
    count = further_prompts(missing, kept, kept + dropped, most)
    assert 1 <= count <= most
    if kept and count < most:
        assert count * kept >= missing * (kept + dropped)


def test_the_first_draw_is_a_whole_batch_and_later_ones_follow_what_was_kept() -> None:
    assert further_prompts(16, 0, 0, most=16) == 16
    assert further_prompts(4, 12, 16, most=16) == 6
    assert further_prompts(12, 4, 16, most=16) == 16
