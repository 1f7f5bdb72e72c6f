"""The operators that stand in for `sgl_kernel` on a CPU."""

from importlib.util import module_from_spec, spec_from_file_location
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
    module = module_from_spec(spec)
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
