"""Which tokens are drawn where drafts are verified on a GPU, and what nodes of a tree see there."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kit.engine.drafts.verification import wanted_tokens
from kit.engine.gpu.speculative import whole_mask
from tests.engine.interpreted import interpreted


def test_tokens_are_drawn_by_their_probabilities() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025, 0.0])
    draws = 200_000
    info = SimpleNamespace(
        is_all_greedy=False,
        temperatures=torch.full((draws, 1), 2.0),
        sampling_seed=None,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
    )
    logits = 2 * probabilities.log().expand(draws, -1)
    counts = wanted_tokens(logits, info, 1, torch.arange(draws)).bincount(minlength=6)
    expected = draws * probabilities
    assert counts[5] == 0
    chi_square = ((counts - expected)[:5] ** 2 / expected[:5]).sum()
    assert chi_square < 18.5  # four degrees of freedom: exceeded once in a thousand


def test_each_node_sees_all_before_its_tree_and_its_own_path() -> None:
    torch.manual_seed(0)
    lens, nodes = [3, 0, 5], 4
    own = torch.rand(len(lens), nodes, nodes) < 0.5
    expected = torch.cat(
        [
            torch.cat([torch.ones(nodes, length, dtype=torch.bool), mask], dim=1).flatten()
            for length, mask in zip(lens, own, strict=True)
        ]
    )
    assert torch.equal(whole_mask(own, torch.tensor(lens), sum(lens)), expected)


def test_few_tokens_attend_as_with_sglangs_kernel_and_as_written_out() -> None:
    several_parts, one_part, without_masks = interpreted("tiles")
    for apart in (*several_parts, *one_part, *without_masks):
        assert float(apart) < 1e-5


@pytest.mark.slow
def test_branches_of_a_draft_attend_to_what_they_have_written_themselves() -> None:
    assert interpreted("branches") == [["as", "written", "out"]]
