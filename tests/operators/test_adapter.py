"""An adapter's share of a linear layer against plain torch."""

from __future__ import annotations

import pytest
import torch

from kit.operators.adapter import add_adapter

NAMES = ("base", "x", "a", "b")


def given(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 5, 7), (1, 5, 6), (3, 6), (7, 3)
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def plainly(
    base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, factor: float
) -> torch.Tensor:
    return base + factor * (x @ a.T) @ b.T


def test_value_and_gradients_are_those_of_the_formula() -> None:
    ours, theirs = given(torch.float64), given(torch.float64)
    found, expected = add_adapter(*ours, 0.5), plainly(*theirs, 0.5)
    torch.testing.assert_close(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, one, other in zip(NAMES, ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


def test_the_sum_is_rounded_once() -> None:
    base, x, a, b = (value.detach() for value in given(torch.bfloat16))
    narrow = x.reshape(-1, 6) @ a.T
    exact = base.double() + 0.5 * (narrow.double() @ b.double().T)
    found = add_adapter(base, x, a, b, 0.5)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, exact.to(torch.bfloat16))


def test_without_an_effect_the_bits_of_the_base_stay() -> None:
    base, x, a, b = given(torch.float32)
    assert torch.equal(add_adapter(base, x, a, torch.zeros_like(b), 2.0), base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_an_operator_that_torch_can_compile(dtype: torch.dtype) -> None:
    torch.library.opcheck(torch.ops.kit.add_adapter, (*given(dtype), 0.5))
