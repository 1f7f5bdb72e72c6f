"""Kernels for GPUs of FP8 in blocks, in Triton; see `kit.operators.fp8_cuda`.

Divisions are rounded as torch rounds them, so that codes and scales are those of
`kit.operators.low_precision` to the bit. A product adds 128 columns at a time, scaled, from the
first to the last, in float32 and with one rounding each (fma), whatever the size of its tile.
Nothing is compiled anew for another number of rows.
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

GROUP: tl.constexpr = tl.constexpr(128)
"""Columns, and of weights also rows, that share a scale."""
LARGEST: tl.constexpr = tl.constexpr(448.0)
LEAST: tl.constexpr = tl.constexpr(1e-10)


@triton.jit
def _scale(largest):
    """The scale of what has this largest number."""
    bound = tl.zeros_like(largest) + LARGEST
    # A comparison keeps NaN, which a maximum would drop.
    return tl.div_rn(tl.where(largest < LEAST, LEAST, largest), bound)


@triton.jit
def _codes(wide, scale):
    """Numbers in the units of their scale, in e4m3; the conversion rounds to the nearest."""
    scaled = tl.div_rn(wide, scale)
    scaled = tl.where(scaled > LARGEST, LARGEST, tl.where(scaled < -LARGEST, -LARGEST, scaled))
    return scaled.to(tl.float8e4nv)


@triton.jit
def _largest(values, axis: tl.constexpr):
    """The largest size of a number, and NaN where one is NaN."""
    size = tl.abs(values)
    broken = tl.max((size != size).to(tl.int32), axis=axis)
    most = tl.max(tl.where(size == size, size, 0.0), axis=axis)
    return tl.where(broken > 0, float("nan"), most)


@triton.jit(do_not_specialize=["rows", "scale_stride"])
def rows_kernel(
    x, codes, scales, rows, columns, x_stride, scale_stride, ROWS: tl.constexpr,
    READS: tl.constexpr,
):  # fmt: skip
    """Quantise a group of columns of some rows.

    `READS` writes what the codes stand for, in x's dtype, and no scales; otherwise the scales of a
    group of columns lie side by side, and `scale_stride` apart from those of the next.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    column = group * GROUP + tl.arange(0, GROUP)
    known = (row < rows)[:, None] & (column < columns)[None, :]
    given = tl.load(x + row[:, None] * x_stride + column[None, :], mask=known, other=0.0)
    wide = given.to(tl.float32)
    scale = _scale(_largest(wide, 1))
    spread = scale[:, None] + tl.zeros_like(wide)
    coded = _codes(wide, spread)
    place = codes + row[:, None] * columns + column[None, :]
    if READS:
        tl.store(place, (coded.to(tl.float32) * spread).to(given.dtype), mask=known)
    else:
        tl.store(place, coded, mask=known)
        tl.store(scales + group * scale_stride + row, scale, mask=row < rows)


@triton.jit
def blocks_kernel(
    weight, codes, scales, rows, columns, weight_stride, scale_stride, READS: tl.constexpr,
):  # fmt: skip
    """Quantise a block of a weight, rounded to bfloat16 first; `READS` as in `rows_kernel`."""
    down, across = tl.program_id(0), tl.program_id(1)
    row = down.to(tl.int64) * GROUP + tl.arange(0, GROUP)
    column = across * GROUP + tl.arange(0, GROUP)
    known = (row < rows)[:, None] & (column < columns)[None, :]
    at = weight + row[:, None] * weight_stride + column[None, :]
    wide = tl.load(at, mask=known, other=0.0).to(tl.bfloat16).to(tl.float32)
    scale = _scale(_largest(_largest(wide, 1)[None, :], 1))
    spread = scale[:, None] + tl.zeros_like(wide)
    coded = _codes(wide, spread)
    place = codes + row[:, None] * columns + column[None, :]
    if READS:
        tl.store(place, (coded.to(tl.float32) * spread).to(codes.dtype.element_ty), mask=known)
    else:
        tl.store(place, coded, mask=known)
        tl.store(scales + down * scale_stride + across + tl.arange(0, 1), scale)


@triton.jit(do_not_specialize=["rows", "x_scale_stride"])
def block_product_kernel(
    x, x_scales, weight, weight_scales, out, rows, columns, size, x_scale_stride,
    weight_scale_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T of codes, times their scales.

    Programs go through `BAND` tiles of rows before they go on to the next columns, so that what
    they read of the weight is near.
    """
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    number = tl.program_id(0)
    first = number // (BAND * across) * BAND
    high = tl.minimum(down - first, BAND)
    inner = number % (BAND * across)
    row = (first + inner % high) * ROWS + tl.arange(0, ROWS)
    column = (inner // high) * COLUMNS + tl.arange(0, COLUMNS)
    known, inside = row < rows, column < columns
    step = tl.arange(0, GROUP)
    of_rows = x + row.to(tl.int64)[:, None] * size + step[None, :]
    of_columns = weight + column.to(tl.int64)[None, :] * size + step[:, None]
    # A tile is no wider than a block of the weight, and lies within one.
    of_scales = weight_scales + (inner // high) * COLUMNS // GROUP * weight_scale_stride
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for group in range(0, size // GROUP):
        a = tl.load(of_rows + group * GROUP, mask=known[:, None], other=0.0)
        b = tl.load(of_columns + group * GROUP, mask=inside[None, :], other=0.0)
        own = tl.load(x_scales + group * x_scale_stride + row, mask=known, other=0.0)
        scale = (own * tl.load(of_scales + group))[:, None]
        total = tl.fma(tl.dot(a, b), tl.broadcast_to(scale, (ROWS, COLUMNS)), total)
    place = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])
