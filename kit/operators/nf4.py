"""NF4: weights in 4 bits, as QLoRA keeps those that are frozen, and products with them.

A weight is cut into blocks of 64 numbers in its own order. Each number is the nearest of 16 levels,
times the largest of its block; the largest ones are in 8 bits themselves, as differences from their
mean, in blocks of 256 with a factor each. That makes 4.127 bits a number:

    4  +  8 / 64  +  32 / (64 * 256)

Levels and layout are those of torchao, with which the tests compare. Its tensor class is not used:
compiled layers cannot look into it, what moves a trainer to host memory does not see what it holds,
it reads a weight through indices of 8 bytes a number, and of a block of zeros it makes others.

`weight` reads a weight, and `linear` multiplies with one that nothing keeps: the backward pass
reads it again. Both are operators that `torch.compile` does not look into, so that the same numbers
come out wherever they are read.

Dettmers et al., https://arxiv.org/abs/2305.14314.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import Any

import torch
from torch import nn

BLOCK = 64
"""Numbers that share a scale."""
SCALES = 256
"""Scales that share a factor, or fewer where their number is no multiple."""
BITS = 4 + 8 / BLOCK + 32 / (BLOCK * SCALES)
"""Bits a number, all together."""
LEVELS = (
    -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
    0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Quantized:
    """A weight (N, K) in 4 bits."""

    codes: torch.Tensor
    """Two levels a byte, the first in its upper half; (N K / 2), uint8."""
    scales: torch.Tensor
    """Of each block; (N K / 64), int8."""
    factors: torch.Tensor
    """What the scales of a block of them are divided by, float32."""
    mean: torch.Tensor
    """What is added to each of them then, float32."""

    @property
    def parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The four tensors, in the order in which the operators take them."""
        return self.codes, self.scales, self.factors, self.mean


def quantize(value: torch.Tensor) -> Quantized:
    """Quantise a weight whose size is a multiple of 64, on the device on which it is."""
    flat = value.detach().float().reshape(-1, BLOCK)
    largest = flat.abs().amax(1)
    mean = largest.double().mean().float()  # so that no device's order of summation shows
    centred = (largest - mean).view(-1, gcd(len(largest), SCALES))
    reach = centred.abs().amax(1, keepdim=True)
    factors = torch.where(reach > 0, 128 / reach, 1.0)
    scales = (centred * factors).round().clamp(-128, 127).to(torch.int8)
    levels = torch.tensor(LEVELS, device=value.device)
    between = (levels[1:] + levels[:-1]) / 2
    shares = flat / torch.where(largest > 0, largest, 1.0)[:, None]  # zeros stay zeros
    codes = torch.bucketize(shares.view(-1), between, out_int32=True).to(torch.uint8)
    pairs = codes.view(-1, 2)
    return Quantized(pairs[:, 0] << 4 | pairs[:, 1], scales.view(-1), factors.view(-1), mean)


@cache
def byte_levels(device: torch.device) -> torch.Tensor:
    """The two levels that a byte stands for, (256, 2)."""
    levels = torch.tensor(LEVELS, device=device)
    byte = torch.arange(256, device=device)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)


def read_blocks(
    codes: torch.Tensor, scales: torch.Tensor, pairs: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers of a weight one after the other: the level of each, times its block's scale.

    Args:
        codes: two levels a byte.
        scales: one for each block.
        pairs: the levels that a byte stands for, as `byte_levels` gives them.
        dtype: what each number is rounded to.
    """
    blocks = pairs[codes.int()].view(scales.shape[0], BLOCK)
    return (blocks * scales[:, None]).to(dtype)


@cache
def compiled_read() -> Any:
    """`read_blocks` in one kernel: what is between would take several times what comes out."""
    return torch.compile(read_blocks, dynamic=True)


@torch.library.custom_op("kit::nf4_weight", mutates_args=())
def weight(
    codes: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor,
    mean: torch.Tensor,
    columns: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The weight (N, columns), computed in float32 and rounded once to a dtype."""
    each = scales.view(len(factors), -1) / factors[:, None] + mean
    read = compiled_read() if codes.is_cuda else read_blocks
    with torch.no_grad():  # as it is here in any case; compiled code would be made for both
        # A copy, since the compiler would look at the shape behind a view, and compile for each.
        value: torch.Tensor = read(codes, each.view(-1).clone(), byte_levels(codes.device), dtype)
    return value.view(-1, columns)


@weight.register_fake
def _(
    codes: torch.Tensor, _s: Any, _f: Any, _m: Any, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    return codes.new_empty(2 * codes.shape[0] // columns, columns, dtype=dtype)


@torch.library.custom_op("kit::nf4_linear", mutates_args=())
def linear(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor,
    mean: torch.Tensor,
) -> torch.Tensor:
    """Product of x (..., K) with the weight (N, K) in the dtype of x; (..., N)."""
    value = weight(codes, scales, factors, mean, x.shape[-1], x.dtype)
    return nn.functional.linear(x, value)


@linear.register_fake
def _(x: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], 2 * codes.shape[0] // x.shape[-1])


@torch.library.custom_op("kit::nf4_linear_backward", mutates_args=())
def _linear_backward(
    gradient: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    factors: torch.Tensor,
    mean: torch.Tensor,
) -> torch.Tensor:
    columns = 2 * codes.shape[0] // gradient.shape[-1]
    value: torch.Tensor = weight(codes, scales, factors, mean, columns, gradient.dtype)
    return gradient @ value


@_linear_backward.register_fake
def _(gradient: torch.Tensor, codes: torch.Tensor, *_: Any) -> torch.Tensor:
    columns = 2 * codes.shape[0] // gradient.shape[-1]
    return gradient.new_empty(*gradient.shape[:-1], columns)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _linear_backward(gradient, *ctx.saved_tensors), None, None, None, None


linear.register_autograd(_gradients, setup_context=_keep)
