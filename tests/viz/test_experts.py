"""Experts of a mixture as pictures: the load of each, and who took a token."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kit.errors import DataError
from kit.samples import Rollout, Sample
from kit.samples.experts import RoutedExperts, load
from kit.samples.token_values import find, known, quantity
from kit.viz.samples.scales import scale_of


def sample(*chosen: tuple[int, int], count: int = 4) -> Sample:
    """Two prompt tokens and a response; the same two experts in layers 1 and 3 for each row."""
    rows = [[pair, pair[::-1]] for pair in chosen]
    record = RoutedExperts(np.array(rows, np.uint8), (1, 3), count)
    length = len(chosen) - 1
    bare = Sample(tokens=[5, 6], response="abcdefgh"[:length])
    return bare.continued([7] * length, [-1.0] * length, 0, record)


def test_the_load_counts_each_expert_of_each_layer_and_leaves_unknown_rows_out() -> None:
    some = sample((0, 1), (2, 1), (255, 255))
    record = some.rollout_routed_experts
    assert record is not None
    assert load([record, record]).tolist() == [[2, 4, 2, 0], [2, 4, 2, 0]]


def test_a_heat_map_names_layers_by_their_number_and_tells_how_many_tokens_changed() -> None:
    one, other = sample((0, 1), (2, 1), (0, 1)), sample((0, 1), (0, 1))
    annotated = Rollout([one.with_values(experts_changed=[0.0, 2.0]), other])
    picture = annotated.experts()
    table = [line.split() for line in picture.plain.splitlines()[-3:]]
    assert table[0] == ["expert", "0", "1", "2", "3"]
    assert table[1] == ["layer", "1", "1.6", "2.0", "0.4", "0.0"]
    assert table[2][:2] == ["layer", "3"]
    assert "5 tokens, each sent to 2 of 4 experts in 2 layers" in picture.plain
    assert "The trainer would send 50.0% of response tokens elsewhere" in picture.plain
    assert 'title="layer 3, expert 1: 2.00 of an even share"' in picture.html


def test_a_rollout_without_records_says_how_to_have_some() -> None:
    with pytest.raises(DataError, match="enable_return_routed_experts: true"):
        Rollout([Sample(tokens=[1])]).experts()


def test_a_strip_shows_which_expert_was_asked_for_each_token_of_the_response() -> None:
    some = sample((0, 1), (2, 1), (3, 1), (255, 255))
    assert [name for name in known(some) if "expert" in name] == [
        "expert_of_layer_1",
        "expert_of_layer_3",
    ]
    first, second, third = find(some, "expert_of_layer_1") or []
    assert (first, second) == (2.0, 3.0)  # of the rows that predict the response's tokens
    assert math.isnan(third)
    assert find(some, "expert_of_layer_2") is None
    drawn = some.strip(quantity="expert_of_layer_1")
    assert "first of the experts in layer 1" in drawn.plain
    assert "mean" not in drawn.plain


def test_many_experts_share_the_colours_with_their_neighbours() -> None:
    values = [0.0, 41.0, 127.0]
    scale = scale_of(quantity("expert_of_layer_0", values), values)
    assert scale.words[0] == "numbers 0–11"
    assert scale.counts(values) == [1, 0, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    assert scale.stands_out(values) is None
