"""Weights in 4 bits: torchao's numbers, products and gradients of what is read, zeros that stay."""

from __future__ import annotations

from math import gcd

import pytest
import torch

from kit.memory.sizes import NF4_BYTES
from kit.models.adapters import NF4_BLOCK
from kit.operators import nf4

SHAPES = [(1024, 512), (448, 128), (64, 128), (3, 64)]


def made(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(rows, columns, generator=random)


def read(found: nf4.Quantized, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    value: torch.Tensor = nf4.weight(*found.parts, columns, dtype)
    return value


@pytest.mark.parametrize(("rows", "columns"), SHAPES[:3])
def test_a_weight_becomes_what_torchao_makes_of_it(rows: int, columns: int) -> None:
    from torchao.dtypes.nf4tensor import to_nf4

    value = made(rows, columns)
    found = nf4.quantize(value)
    theirs = to_nf4(value, nf4.BLOCK, gcd(value.numel() // nf4.BLOCK, nf4.SCALES))
    assert torch.equal(found.codes, theirs.quantized_data)
    assert torch.equal(found.scales, theirs.quantized_scalers)
    expected = theirs.get_original_weight()
    torch.testing.assert_close(read(found, columns), expected, rtol=0, atol=1e-8)
    assert torch.equal(read(found, columns, torch.bfloat16), read(found, columns).bfloat16())


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_no_number_is_further_off_than_half_of_what_lies_between_two_levels(
    rows: int, columns: int
) -> None:
    value = made(rows, columns)
    off = (read(nf4.quantize(value), columns) - value).abs().view(-1, nf4.BLOCK)
    largest = value.abs().view(-1, nf4.BLOCK).amax(1, keepdim=True)
    # The scale is off too, by at most 1/256 of how far scales lie apart.
    assert bool((off <= largest * (1 - 0.6962) / 2 + largest.max() / 100).all())


def test_what_was_quantised_once_is_quantised_to_nearly_the_same_again() -> None:
    once = read(nf4.quantize(made(256, 256)), 256)
    again = read(nf4.quantize(once), 256)
    assert (again - once).norm() < 0.01 * once.norm()


def test_blocks_of_zeros_stay_zeros_and_equal_numbers_are_exact() -> None:
    value = made(128, 128)
    value[3] = 0.0
    assert bool((read(nf4.quantize(value), 128)[3] == 0).all())
    for same in (torch.zeros(64, 64), torch.full((64, 64), -0.5)):
        assert torch.equal(read(nf4.quantize(same), 64), same)


def test_products_and_gradients_are_those_of_the_weight_that_is_read() -> None:
    found = nf4.quantize(made(448, 128))
    value = read(found, 128)
    x = torch.randn(2, 5, 128, requires_grad=True)
    product = nf4.linear(x, *found.parts)
    assert torch.equal(product, torch.nn.functional.linear(x, value))
    product.square().sum().backward()
    gradient, x.grad = x.grad, None
    torch.nn.functional.linear(x, value).square().sum().backward()
    assert gradient is not None
    assert torch.equal(gradient, x.grad)  # type: ignore[arg-type]


def test_the_operators_are_what_compilers_are_told_of_them() -> None:
    found = nf4.quantize(made(448, 128))
    x = torch.randn(5, 128, requires_grad=True)
    torch.library.opcheck(nf4.linear, (x, *found.parts))
    torch.library.opcheck(nf4.weight, (*found.parts, 128, torch.bfloat16))


def test_the_bytes_that_are_planned_for_are_those_that_it_takes() -> None:
    found = nf4.quantize(made(1024, 1024))
    size = sum(part.numel() * part.element_size() for part in found.parts)
    assert size == int(NF4_BYTES * 1024 * 1024) + 4
    assert pytest.approx(NF4_BYTES * 8) == nf4.BITS == pytest.approx(4.127, abs=1e-3)
    assert NF4_BLOCK == nf4.BLOCK


@pytest.mark.slow
def test_compiled_code_reads_the_same_bits_by_one_graph_for_weights_of_every_size() -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = nf4.compiled_read()
    for rows, columns in ((1024, 512), (448, 128), (64, 128), (512, 1024)):
        found = nf4.quantize(made(rows, columns))
        levels = nf4.byte_levels(found.codes.device)
        each = found.scales.view(len(found.factors), -1) / found.factors[:, None] + found.mean
        for dtype in (torch.float32, torch.bfloat16):
            value = compiled(found.codes, each.view(-1).clone(), levels, dtype)
            assert torch.equal(value.view(-1, columns), read(found, columns, dtype))
    assert counters["stats"]["unique_graphs"] == 2
    torch._dynamo.reset()
