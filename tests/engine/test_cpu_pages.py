"""Zeros on pages that are taken when they are first written to."""

from typing import Any

import pytest
import torch

pytestmark = pytest.mark.in_sglang


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        (((300, 1024, 4),), torch.float32),
        (((3,),), torch.int64),
        ((1 << 20, 2), torch.bfloat16),
        ((1 << 21,), None),
        (((0, 5),), torch.float32),
        ((torch.Size([1024, 1024]),), torch.float16),
    ],
)
def test_they_are_what_torch_makes(size: tuple[Any, ...], dtype: torch.dtype | None) -> None:
    from kit.engine.cpu.operators import TorchOnFreshPages

    made, expected = TorchOnFreshPages.zeros(*size, dtype=dtype), torch.zeros(*size, dtype=dtype)
    assert (made.shape, made.dtype) == (expected.shape, expected.dtype)
    assert made.is_contiguous()
    assert torch.equal(made, expected)
    made[-1:] = 3
    assert float(made.double().sum()) == 3 * made[-1:].numel()


def test_memory_is_taken_as_it_is_written_to_and_given_back() -> None:
    import psutil

    from kit.engine.cpu.operators import TorchOnFreshPages

    def used() -> int:
        return int(psutil.Process().memory_info().rss) >> 20

    before = used()
    made = TorchOnFreshPages.zeros((256, 1 << 20), dtype=torch.uint8)
    assert used() - before < 20
    made[:64] = 1
    assert 50 < used() - before < 90
    del made
    assert used() - before < 20
