"""FP8 in blocks and INT4 in groups: what a quantised engine has of a weight, and how it is read.

    FP8    weights in blocks of 128 x 128, activations in blocks of 1 x 128 as they come
           s = max(largest, 1e-10) / 448, float32;   q = w / s in [-448, 448], rounded to e4m3
    INT4   weights in groups along each row, activations as they are
           s = max(largest / 7, 1e-5), bfloat16;     q = w / s in [-7, 7], rounded half to even

A weight is rounded to bfloat16 before it is quantised, in the trainer as on its way to the engine:
an engine that gets bfloat16 would otherwise have other codes where a number lies between two. The
scale of INT4 is rounded to the dtype in which it travels before it divides. Blocks at the edges of
a weight are as large as what is left of it.

`rounded_weight` and `rounded_activations` give the numbers that the codes stand for, with a
gradient that passes as if nothing had been rounded (straight-through; Bengio et al.,
https://arxiv.org/abs/1308.3432). Both are operators that `torch.compile` does not look into, so
that the same numbers come out wherever they are computed.

The blocks are those of DeepSeek-V3 (https://arxiv.org/abs/2412.19437), which SGLang and Miles take.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.nn.functional import pad

from kit.operators import cuda, fp8_cuda

Method = Literal["fp8", "int4"]

BLOCK = 128
"""Rows and columns of an FP8 block."""
LARGEST_FP8, LEAST_FP8 = 448.0, 1e-10
"""Largest number of e4m3; the smallest maximum of a block that its scale follows."""
LARGEST_INT4, LEAST_INT4 = 7, 1e-5
"""Largest code; the smallest scale of a group."""
GROUP = 128
"""Numbers of a row that share a scale in INT4, where nothing else is set."""
FP8, INT4_SCALE = torch.float8_e4m3fn, torch.bfloat16
"""Dtypes of FP8's codes and of INT4's scales. INT4's codes are int8 until somebody packs them."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are quantised, and whether activations are."""

    method: Method
    group_size: int = GROUP
    """Numbers that share a scale; INT4 only."""
    activations: bool = True
    """Whether FP8 quantises activations too; INT4 never does."""

    @property
    def group(self) -> int:
        """The group size; 0 for FP8, which has blocks."""
        return self.group_size if self.method == "int4" else 0

    @property
    def rounds_activations(self) -> bool:
        """Whether what is multiplied with a weight is quantised."""
        return self.method == "fp8" and self.activations

    @property
    def codes_dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return FP8 if self.method == "fp8" else torch.int8

    @property
    def scales_dtype(self) -> torch.dtype:
        """Dtype of the scales."""
        return torch.float32 if self.method == "fp8" else INT4_SCALE

    def scales_shape(self, rows: int, columns: int) -> tuple[int, int]:
        """Shape of the scales of a weight (rows, columns)."""
        if self.method == "fp8":
            return -(-rows // BLOCK), -(-columns // BLOCK)
        return rows, columns // self.group_size

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes (N, K) and scales of a weight (N, K), on its device.

        What is not finite gives a scale that is not.
        """
        if self.method == "fp8":
            return quantize_fp8(weight)
        return quantize_int4(weight, self.group_size)

    def read(self, codes: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The numbers (N, K) that codes and scales stand for, rounded once from float32."""
        return read(codes, scales, self.group, dtype)


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) in e4m3 and scales (N / 128, K / 128) in float32, rounded up at the edges."""
    if fp8_cuda.runs_on(weight.device):
        return fp8_cuda.quantize_blocks(weight.detach())
    wide = weight.detach().bfloat16().float()
    rows, columns = wide.shape
    blocks = pad(wide.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    largest = blocks.view(-(-rows // BLOCK), BLOCK, -1, BLOCK).amax((1, 3))
    scales = largest.clamp_min(LEAST_FP8) / LARGEST_FP8
    return _e4m3(wide / _spread_blocks(scales, rows, columns)), scales


def quantize_int4(weight: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) in int8, from -7 to 7, and scales (N, K / group_size) in bfloat16."""
    groups = weight.detach().bfloat16().float().unflatten(1, (-1, group_size))
    largest = groups.abs().amax(2)
    scales = (largest / LARGEST_INT4).clamp_min(LEAST_INT4).to(INT4_SCALE)
    codes = (groups / scales.float()[:, :, None]).round().clamp(-LARGEST_INT4, LARGEST_INT4)
    return codes.to(torch.int8).flatten(1), scales


def read(codes: torch.Tensor, scales: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """The numbers that codes (N, K) stand for; `group` is INT4's group size, and 0 for FP8."""
    if group and codes.is_cuda:
        return cuda.read_groups(codes, scales, group, dtype)
    rows, columns = codes.shape
    wide = scales.float()
    spread = wide.repeat_interleave(group, 1) if group else _spread_blocks(wide, rows, columns)
    return (codes.float() * spread).to(dtype)


def _spread_blocks(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The scale of each number of a weight of FP8."""
    wide = scales.repeat_interleave(BLOCK, 0)[:rows]
    return wide.repeat_interleave(BLOCK, 1)[:, :columns]


def _e4m3(value: torch.Tensor) -> torch.Tensor:
    return value.clamp(-LARGEST_FP8, LARGEST_FP8).to(FP8)


@torch.library.custom_op("kit::rounded_weight", mutates_args=())
def rounded_weight(weight: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    """A weight (N, K) as its codes read; its gradient passes as it is.

    Args:
        weight: of a linear layer, whole.
        group: INT4's group size, 0 for FP8.
        dtype: what is multiplied in.
    """
    if not group and fp8_cuda.runs_on(weight.device):
        return fp8_cuda.rounded_blocks(weight, dtype)
    codes, scales = quantize_int4(weight, group) if group else quantize_fp8(weight)
    return read(codes, scales, group, dtype)


@rounded_weight.register_fake
def _(weight: torch.Tensor, group: int, dtype: torch.dtype) -> torch.Tensor:
    return weight.new_empty(weight.shape, dtype=dtype)


@torch.library.custom_op("kit::rounded_activations", mutates_args=())
def rounded_activations(x: torch.Tensor) -> torch.Tensor:
    """Activations (..., K) as FP8 in blocks of 1 x 128 reads; their gradient passes as it is."""
    columns = x.shape[-1]
    if fp8_cuda.runs_on(x.device) and columns % BLOCK == 0:
        return fp8_cuda.rounded_rows(x.reshape(-1, columns)).view(x.shape)
    wide = pad(x.float(), (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = wide.abs().amax(-1, keepdim=True).clamp_min(LEAST_FP8) / LARGEST_FP8
    rounded: torch.Tensor = _e4m3(wide / scales).float() * scales
    return rounded.flatten(-2)[..., :columns].to(x.dtype).contiguous()


@rounded_activations.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape)


def _remember_dtype(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.dtype = inputs[0].dtype


def _pass_weight(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return gradient.to(ctx.dtype), None, None


def _pass_activations(_ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
    return gradient


rounded_weight.register_autograd(_pass_weight, setup_context=_remember_dtype)
rounded_activations.register_autograd(_pass_activations)


# ---- in files -----------------------------------------------------------------------------------


PER_WORD = 8
"""INT4 codes in an int32."""


def pack_int4(codes: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) as int32 (N, K / 8): each plus 8 in four bits, the first in the lowest ones.

    Raises:
        ValueError: K is no multiple of 8.
    """
    if codes.shape[1] % PER_WORD:
        raise ValueError(f"{codes.shape[1]} columns are no multiple of {PER_WORD}")
    raised = (codes.to(torch.int64) + 8).unflatten(1, (-1, PER_WORD))
    words = (raised << (4 * torch.arange(PER_WORD, device=codes.device))).sum(2)
    return torch.where(words > 0x7FFFFFFF, words - (1 << 32), words).to(torch.int32)


def unpack_int4(words: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) as int8 of what `pack_int4` gave."""
    shifts = 4 * torch.arange(PER_WORD, device=words.device)
    raised = (words.to(torch.int64)[:, :, None] >> shifts) & 15
    return (raised - 8).to(torch.int8).flatten(1)
