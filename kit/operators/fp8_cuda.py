"""FP8 in blocks on a GPU: quantised, and multiplied, with the same bits wherever a row is.

What `kit.operators.low_precision` computes in torch is computed here by kernels, to the bit, and
the products of codes by the tensor cores. Engine and trainer call the same functions.

products    of few rows by `block_product_kernel`; of more by torch's library, which is faster, for
            weights with which `prove_products` has found it to give the kernel's bits

Shapes: T rows, K columns, N outputs; K and N are multiples of 128.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.nn.functional import ScalingType, scaled_mm

HOPPER = (9, 0)
"""Compute capability of the GPUs on which this was run."""
BLOCK = 128
FP8 = torch.float8_e4m3fn
TILE_ROWS = 16
"""Rows of a group of columns that one program quantises; a library's product has a multiple."""
TILE = (64, 64, 4, 4)
"""Rows and columns of a tile of a product, its warps and its stages; no others were faster for the
shapes of Qwen3. The bits are the same in all."""
FEW = 128
"""Rows up to here are multiplied by the kernel, which is not slower there."""
MANY = (
    *range(FEW + TILE_ROWS, 513, TILE_ROWS),
    *(640, 784, 1024, 1504, 2000, 2048, 3344, 4096, 6000, 8192, 12352, 16384, 24000, 32768),
)
"""Numbers of rows at which the library is compared with the kernel."""
MOST_TRIED = 1 << 28
"""Elements of a product that is compared, at most."""
PROVEN: dict[tuple[int, int], int] = {}
"""Shapes (N, K) of weights that the library multiplies, and for how many rows at most."""


def runs_on(device: torch.device) -> bool:
    """Whether the kernels were run on such a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (T, K) and scales (T, K / 128), float32, of x (T, K).

    The scales of a group of columns lie side by side. After the rows there is room for more, up to
    a multiple of 16, whose contents mean nothing: see `filled`.
    """
    rows, columns = x.shape
    room = -(-rows // TILE_ROWS) * TILE_ROWS
    codes = torch.empty(room, columns, dtype=FP8, device=x.device)
    scales = torch.empty(columns // BLOCK, room, dtype=torch.float32, device=x.device)
    _run_rows(x, codes[:rows], scales[:, :rows], reads=False)
    return codes[:rows], scales[:, :rows].T


def filled(codes: torch.Tensor, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantised rows with the room behind them, which the library needs; a copy without any."""
    rows, columns = codes.shape
    room, groups = -(-rows // TILE_ROWS) * TILE_ROWS, scales.shape[1]
    whole = codes.untyped_storage().nbytes() == room * columns and not codes.storage_offset()
    if whole and scales.stride() == (1, room) and not scales.storage_offset():
        return (
            codes.as_strided((room, columns), (columns, 1)),
            scales.as_strided((room, groups), (1, room)),
        )
    more_codes, more_scales = codes.new_zeros(room, columns), scales.new_zeros(groups, room).T
    more_codes[:rows], more_scales[:rows] = codes, scales
    return more_codes, more_scales


def rounded_rows(x: torch.Tensor) -> torch.Tensor:
    """What the codes of x (T, K) stand for, in its dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run_rows(x, out, out, reads=True)
    return out


def _run_rows(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *, reads: bool) -> None:
    from kit.operators.fp8_kernels import rows_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    if not rows:
        return
    grid = (-(-rows // TILE_ROWS), columns // BLOCK)
    rows_kernel[grid](
        x,
        codes,
        scales,
        rows,
        columns,
        x.stride(0),
        scales.stride(0),
        ROWS=TILE_ROWS,
        READS=reads,
        num_warps=4,
        enable_fp_fusion=False,
    )


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and scales (N / 128, K / 128), float32, of a weight (N, K)."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    shape = -(-rows // BLOCK), -(-columns // BLOCK)
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device)
    _run_blocks(weight, codes, scales, reads=False)
    return codes, scales


def rounded_blocks(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What the codes of a weight (N, K) stand for."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    _run_blocks(weight, out, out, reads=True)
    return out


def _run_blocks(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *, reads: bool
) -> None:
    from kit.operators.fp8_kernels import blocks_kernel

    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    rows, columns = weight.shape
    blocks_kernel[(-(-rows // BLOCK), -(-columns // BLOCK))](
        weight,
        codes,
        scales,
        rows,
        columns,
        weight.stride(0),
        scales.stride(0),
        READS=reads,
        num_warps=8,
        enable_fp_fusion=False,
    )


def product(
    x: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Product (T, N) of x with a weight, codes and scales each."""
    (x_codes, x_scales), rows = x, len(x[0])
    most = PROVEN.get((weight[0].shape[0], weight[0].shape[1]), 0)
    if rows <= FEW or not most:
        return kernel_product(x, weight, dtype)
    if rows <= most:
        return library_product(filled(*x), weight, dtype)[:rows]
    parts = zip(x_codes.split(most), x_scales.split(most), strict=True)
    return torch.cat([product(part, weight, dtype) for part in parts])


def kernel_product(
    x: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `product`, by the kernel."""
    from kit.operators.fp8_kernels import block_product_kernel

    (x_codes, x_scales), (codes, scales) = x, weight
    rows, (columns, size) = len(x_codes), codes.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if not rows:
        return out
    if rows > 1 and x_scales.stride(0) != 1:
        x_scales = x_scales.T.contiguous().T
    high, wide, warps, stages = TILE
    block_product_kernel[(-(-rows // high) * -(-columns // wide),)](
        x_codes,
        x_scales,
        codes,
        scales,
        out,
        rows,
        columns,
        size,
        x_scales.stride(1),
        scales.stride(0),
        ROWS=high,
        COLUMNS=wide,
        BAND=8,
        num_warps=warps,
        num_stages=stages,
        enable_fp_fusion=False,
    )
    return out


def library_product(
    x: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `product`, by torch's library; T has to be a multiple of 16, and K of 512."""
    (x_codes, x_scales), (codes, scales) = x, weight
    of_rows, of_blocks = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    return scaled_mm(x_codes, codes.T, x_scales, of_rows, scales.T, of_blocks, output_dtype=dtype)


def prove_products(
    shapes: Iterable[tuple[int, int]], device: torch.device, most: int = MOST_TRIED
) -> None:
    """Let torch's library compute the products in which it gives the kernel's bits.

    Args:
        shapes: (N, K) of each weight.
        device: a GPU.
        most: elements of a product that is compared, at most.
    """
    draw = torch.Generator(device).manual_seed(0)
    for rows, columns in sorted({*shapes} - PROVEN.keys()):
        counts = [count for count in MANY if count * max(rows, columns) <= most]
        PROVEN[rows, columns] = 0
        if columns % (4 * BLOCK) or not counts:
            continue
        normal = [
            torch.randn(count, columns, device=device, generator=draw)
            for count in (rows, counts[-1])
        ]
        weight, (codes, scales) = quantize_blocks(normal[0]), quantize_rows(normal[1].bfloat16())
        whole = kernel_product((codes, scales), weight, torch.bfloat16)
        if all(_equal(codes, scales, weight, whole, count) for count in counts):
            PROVEN[rows, columns] = counts[-1]
    torch.cuda.empty_cache()


def _equal(
    codes: torch.Tensor,
    scales: torch.Tensor,
    weight: tuple[torch.Tensor, torch.Tensor],
    whole: torch.Tensor,
    count: int,
) -> bool:
    """Whether the library's product of the last so many rows is the kernel's of all."""
    part = codes[-count:], scales[-count:].T.contiguous().T
    return torch.equal(library_product(part, weight, whole.dtype), whole[-count:])


@torch.library.custom_op("kit::fp8_linear", mutates_args=(), device_types="cuda")
def fp8_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Product (T, N) of x (T, K) with weight (N, K), both quantised, with a gradient.

    It passes as if nothing had been quantised: of x it is taken with what the weight's codes stand
    for, of the weight with what those of x do.
    """
    return product(quantize_rows(x), quantize_blocks(weight), x.dtype)


@fp8_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.custom_op("kit::fp8_linear_gradients", mutates_args=(), device_types="cuda")
def _gradients_op(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    of_x = gradient @ rounded_blocks(weight, x.dtype)
    of_weight = gradient.T @ rounded_rows(x)
    return of_x, of_weight.to(weight.dtype)


@_gradients_op.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    found: tuple[torch.Tensor, torch.Tensor] = _gradients_op(*ctx.saved_tensors, gradient)
    return found


fp8_linear.register_autograd(_gradients, setup_context=_keep)
