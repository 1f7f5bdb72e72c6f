"""FP8 and INT4 against formulas written out: scales, ties, zeros, edges, gradients, words."""

from __future__ import annotations

import math

import pytest
import torch

from kit.operators import low_precision
from kit.operators.low_precision import Scheme, pack_int4, quantize_fp8, quantize_int4, unpack_int4

E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
"""Every number of e4m3, NaN at two places."""


def made(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return 0.02 * torch.randn(*shape, generator=random)


def nearest_e4m3(value: float) -> float:
    """The nearest number of e4m3; of two that are as near, the one with an even last bit."""
    gaps = (E4M3.double() - value).abs().nan_to_num(torch.inf)
    near = (gaps == gaps.min()).nonzero()[:, 0].tolist()
    return E4M3[min(near, key=lambda i: i & 1)].item()


@pytest.mark.parametrize("shape", [(128, 128), (130, 257), (1, 1), (300, 64)])
def test_fp8_has_a_scale_for_each_block_and_the_nearest_code(shape: tuple[int, int]) -> None:
    value = made(*shape)
    codes, scales = quantize_fp8(value)
    assert (codes.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    rows, columns = shape
    assert scales.shape == (math.ceil(rows / 128), math.ceil(columns / 128))
    seen = value.bfloat16().float()
    for i, j in ((0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)):
        block = seen[i // 128 * 128 : i // 128 * 128 + 128, j // 128 * 128 : j // 128 * 128 + 128]
        scale = block.abs().max() / torch.tensor(448.0)
        assert scales[i // 128, j // 128] == scale
        exact = max(-448.0, min(448.0, (seen[i, j] / scale).item()))
        assert codes[i, j].float().item() == nearest_e4m3(exact)
    read = Scheme("fp8").read(codes, scales, torch.float32)
    spread = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
    assert torch.equal(read, codes.float() * spread)


@pytest.mark.parametrize("group", [8, 32, 64])
def test_int4_has_a_scale_for_each_group_and_rounds_half_to_even(group: int) -> None:
    value = made(5, 192)
    codes, scales = quantize_int4(value, group)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.bfloat16)
    assert scales.shape == (5, 192 // group)
    for row in range(5):
        for place in range(192):
            seen = [v.item() for v in value[row].bfloat16().float()]
            begin = place // group * group
            largest = max(abs(v) for v in seen[begin : begin + group])
            scale = torch.tensor(largest / 7).bfloat16().item()
            assert scales[row, place // group].item() == scale
            ratio = (torch.tensor(seen[place]) / torch.tensor(scale)).item()
            assert codes[row, place] == max(-7, min(7, round(ratio)))  # Python rounds half to even


def test_ties_of_int4_go_to_the_even_code() -> None:
    codes, scales = quantize_int4(torch.tensor([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.0]]), 8)
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[7, 0, 2, 2, 0, -2, -2, 0]]


@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int4", 32)])
def test_zeros_stay_zeros_and_their_scale_is_finite(scheme: Scheme) -> None:
    codes, scales = scheme.quantize(torch.zeros(130, 160))
    assert bool((codes.float() == 0).all())
    assert bool((scales > 0).all())
    assert torch.equal(scheme.read(codes, scales, torch.float32), torch.zeros(130, 160))
    assert torch.equal(low_precision.rounded_activations(torch.zeros(3, 5)), torch.zeros(3, 5))


@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int4", 32)])
def test_what_is_quantised_is_the_weight_rounded_to_bfloat16(scheme: Scheme) -> None:
    value = made(64, 128)
    once, rounded = scheme.quantize(value), scheme.quantize(value.bfloat16())
    assert all(torch.equal(a, b) for a, b in zip(once, rounded, strict=True))


@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int4", 64)])
def test_what_was_quantised_once_stays_within_half_a_step_again(scheme: Scheme) -> None:
    value = made(256, 256)
    codes, scales = scheme.quantize(value)
    read = scheme.read(codes, scales, torch.float32)
    steps = 7 if scheme.method == "int4" else 16  # e4m3 has 3 bits behind its first
    assert bool(((read - value).abs() <= value.abs().max() / steps).all())
    again = scheme.read(*scheme.quantize(read), torch.float32)
    assert (again - read).norm() < 0.01 * read.norm()


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("scheme", [Scheme("fp8"), Scheme("int4", 32)])
def test_what_is_not_finite_shows_in_the_scale_and_in_what_is_read(
    scheme: Scheme, bad: float
) -> None:
    value = made(8, 64)
    value[3, 5] = bad
    _, scales = scheme.quantize(value)
    assert not bool(scales.isfinite().all())
    read = low_precision.rounded_weight(value, scheme.group, torch.float32)
    assert not bool(read.isfinite().all())


def test_activations_have_a_scale_for_each_row_and_128_columns() -> None:
    x = made(3, 4, 200) * torch.logspace(-4, 4, 12).view(3, 4, 1)
    rounded = low_precision.rounded_activations(x)
    for part in (slice(0, 128), slice(128, 200)):
        block = x[..., part]
        scale = block.abs().amax(-1, keepdim=True) / 448
        codes = (block / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(rounded[..., part], codes.float() * scale)
    assert low_precision.rounded_activations(x.bfloat16()).dtype is torch.bfloat16
    # No row sees another: packing changes nothing.
    assert torch.equal(low_precision.rounded_activations(x[1:2, 2]), rounded[1:2, 2])


@pytest.mark.parametrize("group", [0, 32])
def test_gradients_pass_as_if_nothing_had_been_rounded(group: int) -> None:
    weight, x = made(24, 64).requires_grad_(), made(5, 64, seed=1).requires_grad_()
    up = made(5, 24, seed=2)
    rounded_x = low_precision.rounded_activations(x)
    rounded_w = low_precision.rounded_weight(weight, group, torch.float32)
    torch.nn.functional.linear(rounded_x, rounded_w).backward(up)
    assert x.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(x.grad, up @ rounded_w.detach())
    torch.testing.assert_close(weight.grad, up.T @ rounded_x.detach())


def test_compiled_code_rounds_to_the_same_numbers() -> None:
    weight, x = made(24, 64), made(5, 64, seed=1)

    def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (
            low_precision.rounded_activations(x)
            @ low_precision.rounded_weight(weight, 0, torch.float32).T
        )

    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight), product(x, weight))


def test_codes_go_through_words_the_first_in_the_lowest_bits() -> None:
    codes = _random_codes()
    words = pack_int4(codes)
    assert words.dtype is torch.int32
    assert torch.equal(unpack_int4(words), codes)
    first = torch.tensor([[1, 0, 0, 0, 0, 0, 0, -8]], dtype=torch.int8)
    assert pack_int4(first).tolist() == [[0x08888889]]
    with pytest.raises(ValueError, match="12 columns"):
        pack_int4(torch.zeros(1, 12, dtype=torch.int8))


@pytest.mark.slow
def test_the_words_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import (
        pack_to_int32,
        unpack_from_int32,
    )

    codes = _random_codes()
    assert torch.equal(pack_int4(codes), pack_to_int32(codes, 4))
    assert torch.equal(unpack_from_int32(pack_int4(codes), 4, codes.shape), codes)


def _random_codes() -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(-8, 8, (6, 64), dtype=torch.int8, generator=random)
