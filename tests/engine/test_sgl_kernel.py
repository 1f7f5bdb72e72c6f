"""The operators that stand in for `sgl_kernel` on a CPU."""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from random import Random
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from kit.cluster.client import CPU_OPERATORS


def load() -> ModuleType:
    """The module under a name of its own, so that the real one can still be imported."""
    spec = spec_from_file_location("operators", CPU_OPERATORS / "sgl_kernel" / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["operators"] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


operators = load()
WIDTH = 8
spans = st.tuples(st.integers(0, WIDTH), st.integers(0, WIDTH)).map(sorted)


@settings(deadline=None)
@given(
    st.permutations(range(6)),
    st.lists(spans, min_size=1, max_size=6),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_cache_slots_are_written_as_a_loop_over_requests_would(
    rows: list[int], spans: list[list[int]], dtype: torch.dtype
) -> None:
    rows = rows[: len(spans)]
    slots = torch.arange(100, 100 + sum(end - start for start, end in spans), dtype=torch.int64)
    expected, next_slot = torch.full((6, WIDTH), -1), 100
    for row, (start, end) in zip(rows, spans, strict=True):
        for column in range(start, end):
            expected[row, column] = next_slot
            next_slot += 1
    table = torch.full((6, WIDTH), -1, dtype=torch.int32)
    starts, ends = (tensor([span[i] for span in spans], dtype=dtype) for i in (0, 1))
    operators.assign_req_to_token_pool_cpu(tensor(rows, dtype=dtype), table, starts, ends, slots, 8)
    assert table.tolist() == expected.tolist()


def test_slots_beyond_the_last_request_are_left_alone() -> None:
    table = torch.zeros(2, 4, dtype=torch.int32)
    operators.assign_req_to_token_pool_cpu(
        tensor([1]), table, tensor([1]), tensor([3]), tensor([7, 8, 9, 9]), 4
    )
    assert table.tolist() == [[0, 0, 0, 0], [0, 7, 8, 0]]


def test_a_missing_operator_imports_and_names_itself_where_it_is_called() -> None:
    operator = operators.rotary_embedding
    assert operator.__name__ == "rotary_embedding"
    with pytest.raises(RuntimeError, match=r"sgl_kernel\.rotary_embedding has no CPU version"):
        operator(torch.zeros(1), interleaved=True)


def test_what_python_looks_for_in_a_module_is_not_made_up() -> None:
    assert not hasattr(operators, "__wrapped__")
    assert isinstance(operators.__version__, str)


# ---- trees of drafted tokens -------------------------------------------------------------------


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    """The parent of each node but the first."""
    nodes = draw(st.integers(1, 8))
    return [draw(st.integers(0, node)) for node in range(nodes)]


def path(parents: list[int], node: int) -> list[int]:
    """A node and those above it, from the root."""
    return [0] if node == 0 else [*path(parents, parents[node - 1]), node]


def laid_out(batch: list[list[int]], lens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(positions, index, first child, next sibling) of trees that are given by their masks."""
    n = len(batch[0]) + 1
    mask = torch.zeros(len(batch), n, n, dtype=torch.bool)
    for own, parents in zip(mask, batch, strict=True):
        for node in range(n):
            own[node, path(parents, node)] = True
    positions = torch.full((len(batch) * n,), -1)
    tables = [torch.full((len(batch), n), -1) for _ in range(3)]
    operators.speculative.reconstruct_indices_from_tree_mask(
        mask.flatten(), lens, positions, *tables, len(batch), n
    )
    return positions, *tables


@settings(deadline=None)
@given(trees())
def test_a_tree_is_read_from_its_mask(parents: list[int]) -> None:
    batch, n = [parents, [0] * len(parents)], len(parents) + 1
    positions, index, child, sibling = laid_out(batch, tensor([5, 9]))
    depths = [len(path(parents, node)) - 1 for node in range(n)]
    assert positions.tolist() == [5 + d for d in depths] + [9] + [10] * (n - 1)
    assert index.tolist() == [list(range(n)), list(range(n, 2 * n))]
    for node in range(n):
        children, at = [], int(child[0, node])
        while at >= 0:
            children.append(at)
            at = int(sibling[0, at])
        assert children == [other for other in range(1, n) if parents[other - 1] == node]


@settings(deadline=None)
@given(trees(), st.randoms())
def test_the_accepted_path_is_the_one_that_the_target_would_have_written(
    parents: list[int], random: Random
) -> None:
    n, longest = len(parents) + 1, 4
    batch = [parents, parents]
    _, index, child, sibling = laid_out(batch, tensor([3, 3]))
    tokens = [[random.randrange(3) for _ in range(n)] for _ in batch]
    wanted = [[random.randrange(3) for _ in range(n)] for _ in batch]
    predicts = torch.full((2 * n,), -7, dtype=torch.int32)
    accepted = torch.full((2, longest), -1, dtype=torch.int32)
    counts = torch.zeros(2, dtype=torch.int32)
    operators.verify_tree_greedy_cpu(
        predicts, accepted, counts, tensor(tokens), index, child, sibling, tensor(wanted)
    )
    for b in range(2):
        expected = [0]
        while len(expected) < longest:
            after = [
                node
                for node in range(1, n)
                if parents[node - 1] == expected[-1] and tokens[b][node] == wanted[b][expected[-1]]
            ]
            if not after:
                break
            expected.append(after[0])
        assert accepted[b].tolist() == [
            *(b * n + node for node in expected),
            *[-1] * (longest - len(expected)),
        ]
        assert counts[b] == len(expected) - 1
        assert [int(predicts[b * n + node]) for node in expected] == [
            wanted[b][node] for node in expected
        ]


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=4, max_size=4), min_size=1, max_size=4),
    st.randoms(),
)
def test_a_chain_is_accepted_as_a_tree_of_one_branch(rows: list[list[int]], random: Random) -> None:
    chain = [0, 1, 2]
    _, index, child, sibling = laid_out([chain] * len(rows), torch.full((len(rows),), 2))
    wanted = tensor([[random.randrange(3) for _ in row] for row in rows])
    found = []
    for longest in (4, 5):  # the second one takes the way of trees
        predicts = torch.full((4 * len(rows),), -7, dtype=torch.int32)
        accepted = torch.full((len(rows), longest), -1, dtype=torch.int32)
        counts = torch.zeros(len(rows), dtype=torch.int32)
        operators.verify_tree_greedy_cpu(
            predicts, accepted, counts, tensor(rows), index, child, sibling, wanted
        )
        found.append((predicts.tolist(), accepted[:, :4].tolist(), counts.tolist()))
    assert found[0] == found[1]


def test_candidates_become_a_tree() -> None:
    # Two ways on from the root, two from each: 2 + 4 candidates, of which 0, 1, 2 and 5 are kept.
    parents, kept = tensor([[-1, 0, 1]]), tensor([[0, 1, 2, 5]])
    n = 5
    mask, positions = torch.zeros(n * n, dtype=torch.bool), torch.zeros(n, dtype=torch.long)
    index, child, sibling = (torch.full((1, n), -1) for _ in range(3))
    operators.build_tree_kernel_efficient_cpu(
        parents, kept, tensor([7]), mask, positions, index, child, sibling, 2, 2, n, 1
    )
    assert positions.tolist() == [7, 8, 8, 9, 9]
    assert child.tolist() == [[1, 3, 4, -1, -1]]
    assert sibling.tolist() == [[-1, 2, -1, -1, -1]]
    seen = [row.nonzero()[:, 0].tolist() for row in mask.view(n, n)]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 2, 4]]
    with pytest.raises(RuntimeError, match="tree mask is 1, not 0"):
        operators.build_tree_kernel_efficient_cpu(
            parents, kept, tensor([7]), mask, positions, index, child, sibling, 2, 2, n, 0
        )


def test_slots_of_drafts_are_read_and_none_is_moved() -> None:
    table = torch.arange(20, dtype=torch.int32).view(2, 10)
    found = torch.zeros(6, dtype=torch.int64)
    operators.assign_draft_cache_locs_contiguous_cpu(
        tensor([1, 0]), table, tensor([2, 4]), found, 10, 1, 3
    )
    assert found.tolist() == [12, 13, 14, 4, 5, 6]
    found = torch.zeros(5, dtype=torch.int64)
    operators.assign_extend_cache_locs_cpu(
        tensor([0, 1]), table, tensor([1, 0]), tensor([3, 2]), found, 10
    )
    assert found.tolist() == [1, 2, 10, 11, 0]
    same = tensor([3, 4])
    operators.copy_all_layer_kv_cache_cpu(same, same, same, same)
    with pytest.raises(RuntimeError, match="SGLANG_NATIVE_MOVE_KV_CACHE"):
        operators.copy_all_layer_kv_cache_cpu(same, same, same, same + 1)


def test_what_was_accepted_is_taken_together() -> None:
    bonus = torch.zeros(2, dtype=torch.int32)
    operators.fill_bonus_tokens_cpu(tensor([[5, 6, 7], [8, 9, 1]]), tensor([2, 3]), bonus, 3)
    assert bonus.tolist() == [6, 1]
    slots = torch.zeros(4, dtype=torch.int64)
    operators.fill_accept_out_cache_loc_cpu(
        tensor([[0, 2, -1], [3, -1, -1]]), tensor([10, 11, 12, 13, 14, 15]), slots
    )
    assert slots.tolist() == [10, 12, 13, 0]
