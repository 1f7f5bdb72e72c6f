"""FP8 in blocks on a GPU: quantised, and multiplied, with the same bits wherever a row is.

What `kit.operators.low_precision` computes in torch is computed here by kernels, to the bit, and
the products of codes by the tensor cores. Engine and trainer call the same functions.

products    of few rows by DeepGEMM and of more by torch's library, for weights with which
            `prove_products` has found both to give the bits of `block_product_kernel`, which
            multiplies the others

Shapes: T rows, K columns, N outputs; K and N are multiples of 128.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
from torch.library import wrap_triton
from torch.nn.functional import ScalingType, scaled_mm

from kit.operators.cuda import TILE as NORM_TILE
from kit.operators.cuda import power

HOPPER = (9, 0)
"""Compute capability of the GPUs on which this was run."""
BLOCK = 128
FP8 = torch.float8_e4m3fn
TILE_ROWS = 16
"""Rows of a group of columns that one program quantises; torch's product has a multiple."""
ALIGNED = 4
"""Few rows have room for a multiple of so many scales a group, as DeepGEMM reads them."""
READ_ROWS = 32
"""Rows of a group of columns of which one program reads what their codes stand for."""
SILU_BLOCK = 1024
"""Columns of a row that one program computes."""
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
DEEP = 256
"""Rows up to here are multiplied by DeepGEMM, where it is there."""
DEEP_TRIED = (1, 8, *range(16, DEEP + 1, 16))
"""Numbers of rows at which it is compared with the kernel, and compiled."""
DEEP_PROVEN: set[tuple[int, int]] = set()
"""Shapes (N, K) of weights that it multiplies."""
PROVEN: dict[tuple[int, int], int] = {}
"""Shapes (N, K) of weights that the library multiplies, and for how many rows at most."""


@cache
def deep_gemm() -> Any:
    """DeepGEMM, whose kernels are compiled as they are needed; None without it or a compiler."""
    try:
        import deep_gemm
    except (ImportError, AssertionError, OSError):  # no CUDA toolkit is an AssertionError there
        return None
    return deep_gemm


def runs_on(device: torch.device) -> bool:
    """Whether the kernels were run on such a device."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (T, K) and scales (T, K / 128), float32, of x (T, K).

    The scales of a group of columns lie side by side. After the rows there is room for more, up to
    a multiple of 16, of few of 4, whose contents mean nothing: see `filled`.
    """
    rows, columns = x.shape
    codes, scales = _room(x, rows, columns)
    _run_rows(x, codes, scales, reads=False)
    return codes[:rows], scales[:, :rows].T


def quantize_with_room(
    x: torch.Tensor, *, traced: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (R, K) of x (T, K) and their scales (K / 128, R), with the room that torch's product
    needs: R is T up to a multiple of 16. `traced`: for a compiler.
    """
    codes, scales = _room(x, x.shape[0], x.shape[1], TILE_ROWS)
    _run_rows(x, codes, scales, reads=False, traced=traced)
    return codes, scales


def norm_and_quantize(
    x: torch.Tensor, weight: torch.Tensor, eps: float, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`kit.operators.cuda.norm_into` of x (T, K), and what `quantize_rows` gives of that."""
    from kit.operators.fp8_kernels import norm_rows_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    block = power(columns)
    out, (codes, scales) = x.new_empty(rows, columns), _room(x, rows, columns)
    high = max(1, NORM_TILE // block)
    norm_rows_kernel[(-(-rows // high),)](
        x,
        x if residual is None else residual,
        weight,
        out,
        codes,
        scales,
        rows,
        x.stride(0),
        columns,
        eps,
        scales.stride(0),
        ADDS=residual is not None,
        ROWS=high,
        BLOCK=block,
        num_warps=4 if block <= 2 * NORM_TILE else 8,
        enable_fp_fusion=False,
    )
    return out, (codes[:rows], scales[:, :rows].T)


def silu_and_quantize(
    gate: torch.Tensor, up: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """`kit.operators.cuda.silu` of gate and up (T, K), and what `quantize_rows` gives of that."""
    from kit.operators.fp8_kernels import silu_rows_kernel

    rows, columns = gate.shape
    out, (codes, scales) = gate.new_empty(rows, columns), _room(gate, rows, columns)
    silu_rows_kernel[(rows, -(-columns // SILU_BLOCK))](
        gate,
        up,
        out,
        codes,
        scales,
        rows,
        columns,
        gate.stride(0),
        up.stride(0),
        scales.stride(0),
        BLOCK=SILU_BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out, (codes[:rows], scales[:, :rows].T)


def _room(
    x: torch.Tensor, rows: int, columns: int, multiple: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the codes of rows, and for their scales (K / 128, T); of so many, or as needed."""
    multiple = multiple or (ALIGNED if rows <= DEEP else TILE_ROWS)
    room = -(-rows // multiple) * multiple
    return (
        torch.empty(room, columns, dtype=FP8, device=x.device),
        torch.empty(columns // BLOCK, room, dtype=torch.float32, device=x.device),
    )


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


def _run_rows(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    *,
    reads: bool,
    traced: bool = False,
) -> None:
    from kit.operators.fp8_kernels import rows_kernel

    kernel, options = _launched(rows_kernel, traced)
    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = x.shape
    if not rows:
        return
    grid = (-(-rows // TILE_ROWS), columns // BLOCK)
    kernel[grid](
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
        **options,
    )


def _launched(kernel: Any, traced: bool) -> tuple[Any, dict[str, bool]]:
    """A kernel with options that keep a product and a sum two operations, or for a compiler.

    The compiler does not take these options: what is traced has no sum of products.
    """
    return (wrap_triton(kernel), {}) if traced else (kernel, {"enable_fp_fusion": False})


def quantize_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (N, K) and scales (N / 128, K / 128), float32, of a weight (N, K)."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    shape = -(-rows // BLOCK), -(-columns // BLOCK)
    scales = torch.empty(shape, dtype=torch.float32, device=weight.device)
    _run_blocks(weight, codes, scales, reads=False)
    return codes, scales


def quantize_all(
    groups: Sequence[Sequence[torch.Tensor]],
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """`quantize_blocks` of the weights of each group, one below the other, by one kernel for all.

    One for each takes the host longer than the card. All have one dtype, and multiples of 128 rows
    and columns.
    """
    from kit.operators.fp8_kernels import all_blocks_kernel

    weights = [weight.contiguous() for group in groups for weight in group]
    shapes = tuple(tuple((len(w), w.shape[1]) for w in group) for group in groups)
    device, like = weights[0].device, weights[0]
    if any(w.dtype != like.dtype or len(w) % BLOCK or w.shape[1] % BLOCK for w in weights):
        raise ValueError(f"weights have one dtype and multiples of {BLOCK} rows and columns")
    count, length, kept, where = _places(shapes, device)
    codes = torch.empty(count * BLOCK * BLOCK, dtype=FP8, device=device)
    scales = torch.empty(length, dtype=torch.float32, device=device)
    addresses = torch.tensor([weight.data_ptr() for weight in weights])
    if device.type == "cuda":
        addresses = addresses.pin_memory().to(device, non_blocking=True)
    all_blocks_kernel[(count,)](
        addresses, like, *where, codes, scales, num_warps=8, enable_fp_fusion=False
    )
    found = []
    for first, start, rows, columns in kept:
        size, blocks = rows * columns, rows // BLOCK * columns // BLOCK
        begin = first * BLOCK * BLOCK
        found.append(
            (
                codes[begin : begin + size].view(rows, columns),
                scales[start : start + blocks].view(rows // BLOCK, columns // BLOCK),
            )
        )
    return found


@lru_cache(maxsize=8)
def _places(
    shapes: tuple[tuple[tuple[int, int], ...], ...], device: torch.device
) -> tuple[int, int, list[tuple[int, int, int, int]], list[torch.Tensor]]:
    """Where blocks of groups of weights (N, K) are.

    Blocks and room for scales of all; first block and scale, rows and columns of each group; and
    what `all_blocks_kernel` takes of each weight, with the weight of each block.
    """
    widths, firsts, starts, owners = list[int](), list[int](), list[int](), list[int]()
    kept, length = [], 0
    for group in shapes:
        length = -(-length // 32) * 32  # the library reads scales from multiples of 128 bytes on
        kept.append((len(owners), length, sum(rows for rows, _ in group), group[0][1]))
        for rows, columns in group:
            blocks = rows // BLOCK * columns // BLOCK
            widths.append(columns // BLOCK)
            firsts.append(len(owners))
            starts.append(length)
            owners += [len(widths) - 1] * blocks
            length += blocks
    where = [torch.tensor(x, dtype=torch.int32) for x in (widths, firsts, starts, owners)]
    return len(owners), length, kept, [x.to(device) for x in where]


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


def read(
    codes: torch.Tensor,
    scales: torch.Tensor,
    height: int,
    dtype: torch.dtype,
    *,
    traced: bool = False,
) -> torch.Tensor:
    """What codes stand for of which so many rows share a scale, and 128 columns.

    `traced`: for a compiler.
    """
    from kit.operators.fp8_kernels import read_kernel

    kernel, options = _launched(read_kernel, traced)
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if rows:
        kernel[(-(-rows // READ_ROWS), columns // BLOCK)](
            codes,
            scales,
            out,
            rows,
            columns,
            *scales.stride(),
            HEIGHT=height,
            ROWS=READ_ROWS,
            num_warps=4,
            **options,
        )
    return out


def product(
    x: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """Product (T, N) of x with a weight, codes and scales each."""
    (x_codes, x_scales), rows = x, len(x[0])
    shape = weight[0].shape[0], weight[0].shape[1]
    if rows <= DEEP and shape in DEEP_PROVEN and dtype is torch.bfloat16:
        return deep_product(x, weight, dtype)
    most = PROVEN.get(shape, 0)
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


def deep_product(
    x: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `product`, by DeepGEMM, which SGLang brings along; in bfloat16."""
    out = torch.empty(len(x[0]), len(weight[0]), dtype=dtype, device=x[0].device)
    if len(out):
        deep_gemm().fp8_gemm_nt(x, weight, out)
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
    shapes: Iterable[tuple[int, int]],
    device: torch.device,
    most: int = MOST_TRIED,
    *,
    of_few: bool = False,
) -> None:
    """Let libraries compute the products in which they give the kernel's bits.

    Args:
        shapes: (N, K) of each weight.
        device: a GPU.
        most: elements of a product that is compared, at most.
        of_few: whether DeepGEMM is tried for few rows. It compiles its kernels then, which takes
            seconds for each the first time, and is kept (`DG_JIT_CACHE_DIR`).
    """
    draw = torch.Generator(device).manual_seed(0)
    for rows, columns in sorted({*shapes} - PROVEN.keys()):
        counts = [n for n in MANY if n * max(rows, columns) <= most]
        PROVEN[rows, columns] = 0
        if not counts or counts[-1] < DEEP:
            continue
        normal = [
            torch.randn(count, columns, device=device, generator=draw)
            for count in (rows, counts[-1])
        ]
        weight, given = quantize_blocks(normal[0]), quantize_rows(normal[1].bfloat16())
        whole = kernel_product(given, weight, torch.bfloat16)
        if of_few and _deep_is_equal(given, weight, whole):
            DEEP_PROVEN.add((rows, columns))
        # What torch takes are multiples of four groups.
        if columns % (4 * BLOCK) == 0 and all(
            _equal(library_product, given, weight, whole, count) for count in counts
        ):
            PROVEN[rows, columns] = counts[-1]
    torch.cuda.empty_cache()


def _deep_is_equal(
    given: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    whole: torch.Tensor,
) -> bool:
    """Whether DeepGEMM is there, and gives the kernel's bits for all numbers of few rows."""
    if deep_gemm() is None:
        return False
    try:
        return all(_equal(deep_product, given, weight, whole, count) for count in DEEP_TRIED)
    except Exception as error:
        warnings.warn(
            f"DeepGEMM could not multiply ({error}); other products take its place, with the same "
            "bits, but slower.",
            stacklevel=2,
        )
        return False


def _equal(
    product: Callable[..., torch.Tensor],
    given: tuple[torch.Tensor, torch.Tensor],
    weight: tuple[torch.Tensor, torch.Tensor],
    whole: torch.Tensor,
    count: int,
) -> bool:
    """Whether a library's product of the last so many rows is the kernel's of all."""
    codes, scales = given[0][-count:], given[1][-count:]
    room = -(-count // ALIGNED) * ALIGNED
    aligned = scales.new_zeros(scales.shape[1], room).T[:count]
    aligned.copy_(scales)
    return torch.equal(product((codes, aligned), weight, whole.dtype), whole[-count:])
