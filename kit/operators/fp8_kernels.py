"""Kernels for GPUs of FP8 in blocks, in Triton; see `kit.operators.fp8_cuda`.

Codes and scales are those of `kit.operators.low_precision` to the bit. A product adds 128 columns
at a time, scaled, from the first to the last, in float32 and with one rounding each (fma), whatever
the size of its tile. Nothing is compiled anew for another number of rows.
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl

from kit.operators.kernels import added, gated, normed

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
    """Rows of numbers in the units of their scale, in e4m3; the conversion rounds to the nearest.

    The quotient is made of the scale's inverse and mended by what is left, which rounds as a
    division does where that matters: every code of bfloat16 numbers is the division's.
    """
    inverse = tl.broadcast_to(tl.div_rn(tl.zeros_like(scale) + 1.0, scale)[:, None], wide.shape)
    quotient = wide * inverse
    left = tl.fma(-quotient, tl.broadcast_to(scale[:, None], wide.shape), wide)
    return tl.fma(left, inverse, quotient).to(tl.float8e4nv)


@triton.jit
def _largest(values, axis: tl.constexpr):
    """The largest size of a number, and NaN where one is NaN: as integers NaN is the largest."""
    bits = values.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.max(bits, axis=axis).to(tl.float32, bitcast=True)


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
    coded = _codes(wide, scale)
    place = codes + row[:, None] * columns + column[None, :]
    if READS:
        tl.store(place, (coded.to(tl.float32) * scale[:, None]).to(given.dtype), mask=known)
    else:
        tl.store(place, coded, mask=known)
        tl.store(scales + group * scale_stride + row, scale, mask=row < rows)


@triton.jit
def _store_rows(
    values, codes, scales, first, count, start, size, scale_stride, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Quantise and store columns from `start` on of rows from `first` on; values (ROWS, BLOCK)."""
    ACROSS: tl.constexpr = BLOCK // GROUP
    wide = tl.reshape(values.to(tl.float32), (ROWS * ACROSS, GROUP))
    number = tl.arange(0, ROWS * ACROSS)
    row, group = first + number // ACROSS, number % ACROSS + start // GROUP
    known = (row < count) & (group * GROUP < size)
    scale = _scale(_largest(wide, 1))
    coded = _codes(wide, scale)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    tl.store(codes + row[:, None] * size + column, coded, mask=known[:, None])
    tl.store(scales + group * scale_stride + row, scale, mask=known)


@triton.jit(do_not_specialize=["count", "scale_stride"])
def norm_rows_kernel(
    x, residual, weight, out, codes, scales, count, x_stride, size, eps, scale_stride,
    ADDS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Norm of some rows, as `norm_kernel` has it, and what it is quantised to."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    row, column = (first + tl.arange(0, ROWS))[:, None], tl.arange(0, BLOCK)[None, :]
    inside = (row < count) & (column < size)
    wide = tl.load(x + row * x_stride + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        wide = added(wide, residual + row * size + column, inside)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    values = normed(wide, factor, size, eps).to(out.dtype.element_ty)
    tl.store(out + row * size + column, values, mask=inside)
    _store_rows(values, codes, scales, first, count, 0, size, scale_stride, ROWS, BLOCK)


@triton.jit(do_not_specialize=["count", "scale_stride"])
def silu_rows_kernel(
    gate, up, out, codes, scales, count, size, gate_stride, up_stride, scale_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sigmoid-weighted unit of a part of one row, and what it is quantised to."""
    row, start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK
    column = start + tl.arange(0, BLOCK)
    inside = column < size
    wide = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    values = gated(wide, other).to(out.dtype.element_ty)
    tl.store(out + row * size + column, values, mask=inside)
    _store_rows(values, codes, scales, row, count, start, size, scale_stride, 1, BLOCK)


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
    coded = _codes(wide, scale)
    place = codes + row[:, None] * columns + column[None, :]
    if READS:
        tl.store(
            place, (coded.to(tl.float32) * scale[:, None]).to(codes.dtype.element_ty), mask=known
        )
    else:
        tl.store(place, coded, mask=known)
        tl.store(scales + down * scale_stride + across + tl.arange(0, 1), scale)


@triton.jit
def all_blocks_kernel(addresses, like, widths, firsts, starts, owners, codes, scales):
    """Quantise one block of one of many weights, as `blocks_kernel` does.

    By weight: its address, which is that of numbers as `like` has, its blocks across, the number of
    its first block, and the place of its first scale. By block: whose it is.
    """
    number = tl.program_id(0)
    owner = tl.load(owners + number)
    across = tl.load(widths + owner)
    first = tl.load(firsts + owner)
    inner = number - first
    row = (inner // across).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    column = inner % across * GROUP + tl.arange(0, GROUP)
    place = row[:, None] * (across * GROUP) + column[None, :]
    weight = tl.multiple_of(tl.load(addresses + owner).to(like.dtype), 16)
    wide = tl.load(weight + place).to(tl.bfloat16).to(tl.float32)
    scale = _scale(_largest(_largest(wide, 1)[None, :], 1))
    tl.store(codes + first.to(tl.int64) * (GROUP * GROUP) + place, _codes(wide, scale))
    tl.store(scales + tl.load(starts + owner) + inner + tl.arange(0, 1), scale)


@triton.jit(do_not_specialize=["rows", "scale_stride", "group_stride"])
def read_kernel(
    codes, scales, out, rows, columns, scale_stride, group_stride, HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """What the codes of a group of columns of some rows stand for; `HEIGHT` rows share a scale."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group, known = tl.program_id(1), row < rows
    column = group * GROUP + tl.arange(0, GROUP)
    place = row[:, None] * columns + column[None, :]
    wide = tl.load(codes + place, mask=known[:, None]).to(tl.float32)
    at = scales + (row // HEIGHT) * scale_stride + group * group_stride
    scale = tl.load(at, mask=known, other=0.0)
    tl.store(out + place, (wide * scale[:, None]).to(out.dtype.element_ty), mask=known[:, None])


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
