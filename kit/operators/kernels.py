"""The operators' kernels for GPUs, in Triton: each row by one program, in one order.

Every kernel gives a row the same bits whatever rows are beside it: a program has one row (or a tile
of rows of fixed size, whose order of summation is the same for each), and nothing is added by two
programs. Multiplications and additions are fused nowhere but where the code says so.

Sizes: D is that of a head.
"""

# Triton reads the signatures of kernels by itself: their arguments have no types for mypy.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc"

import triton
import triton.language as tl


@triton.jit
def _sums(
    rows, known, columns, inside, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """A tile of products of rows, each from its first element to its last."""
    step = tl.arange(0, STEP)
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, size, STEP):
        at = start + step
        a = tl.load(
            rows[:, None] + at[None, :], mask=known[:, None] & (at < size)[None, :], other=0.0
        )
        b = tl.load(
            columns[None, :] + at[:, None], mask=inside[None, :] & (at < size)[:, None], other=0.0
        )
        total = tl.dot(a, b, total)
    return total


@triton.jit
def product_kernel(
    x, weight, out, rows, columns, size, x_stride, weight_stride, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """A tile of x @ weight.T, its sum taken from the first element of a row to the last."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    known, inside = row < rows, column < columns
    of_rows, of_columns = x + row * x_stride, weight + column * weight_stride
    total = _sums(of_rows, known, of_columns, inside, size, ROWS, COLUMNS, STEP)
    place = out + row[:, None] * columns + column[None, :]
    tl.store(place, total.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit
def experts_kernel(
    x, weight, out, takes, puts, ends, tile_ends, experts, columns, size, x_stride, expert_stride,
    weight_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,
    EXPERTS: tl.constexpr,
):  # fmt: skip
    """A tile of the products of one expert's rows with its weight.

    Row i of those sorted by expert is row `takes[i]` of x, and its product row `puts[i]` of out.
    The rows of expert e end at `ends[e + 1]`, their tiles at `tile_ends[e + 1]`; both begin with 0.
    """
    tile = tl.program_id(0)
    number = tl.arange(0, EXPERTS)
    last = tl.load(tile_ends + 1 + number, mask=number < experts, other=0)
    expert = tl.sum(((last <= tile) & (number < experts)).to(tl.int32), axis=0)
    if expert >= experts:
        return
    first = tl.load(ends + expert) + (tile - tl.load(tile_ends + expert)) * ROWS
    place = first + tl.arange(0, ROWS)
    known = place < tl.load(ends + expert + 1)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < columns
    row = tl.load(takes + place, mask=known, other=0).to(tl.int64)
    to = tl.load(puts + place, mask=known, other=0).to(tl.int64)
    of_columns = weight + expert.to(tl.int64) * expert_stride + column * weight_stride
    of_rows = x + row * x_stride
    total = _sums(of_rows, known, of_columns, inside, size, ROWS, COLUMNS, STEP)
    at = out + to[:, None] * columns + column[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=known[:, None] & inside[None, :])


@triton.jit
def weighted_sum_kernel(parts, weights, out, size, EXPERTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of a part of one row's outputs times their weights, from its first expert on."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(EXPERTS):
        at = parts + (row * EXPERTS + i) * size + column
        part = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(weights + row * EXPERTS + i)
    tl.store(out + row * size + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def route_kernel(
    logits, weights, chosen, experts, stride, TOP: tl.constexpr, NORMALIZES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The `TOP` largest of one row's softmax, by number of the expert; of equals, the first."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < experts
    given = tl.load(logits + row * stride + column, mask=inside, other=-float("inf"))
    wide = given.to(tl.float32)
    share = tl.exp(wide - tl.max(wide, axis=0))
    whole = tl.sum(share, axis=0)
    share = tl.div_rn(share, tl.zeros((BLOCK,), dtype=tl.float32) + whole)
    left, taken = tl.where(inside, share, -1.0), tl.zeros((BLOCK,), dtype=tl.int32)
    for _ in range(TOP):
        is_best = (left == tl.max(left, axis=0)) & inside
        first = tl.min(tl.where(is_best, column, BLOCK), axis=0)
        taken = tl.where(column == first, 1, taken)
        left = tl.where(column == first, -1.0, left)
    if NORMALIZES:
        sum_of_taken = tl.sum(tl.where(taken > 0, share, 0.0), axis=0)
        share = tl.div_rn(share, tl.zeros((BLOCK,), dtype=tl.float32) + sum_of_taken)
    to = row * TOP + tl.cumsum(taken, axis=0) - 1
    tl.store(weights + to, share, mask=taken > 0)
    tl.store(chosen + to, column, mask=taken > 0)


@triton.jit
def normed(wide, factor, size, eps):
    """Root mean square norm of rows of so many elements, others being 0, times a factor."""
    length = tl.sqrt_rn(tl.sum(wide * wide, axis=1) / size + eps)
    return wide * tl.div_rn(tl.zeros_like(length) + 1.0, length)[:, None] * factor


@triton.jit
def gated(gate, up):
    """Sigmoid-weighted unit: gate / (1 + exp(-gate)) * up."""
    return gate / (tl.exp(-gate) + 1.0) * up


@triton.jit
def added(wide, residual, inside):
    """Sum with a residual, rounded to the residual's dtype, which is then the sum."""
    given = tl.load(residual, mask=inside, other=0.0)
    whole = (wide + given.to(tl.float32)).to(given.dtype)
    tl.store(residual, whole, mask=inside)
    return whole.to(tl.float32)


@triton.jit
def norm_kernel(
    x, x_more, residual, weight, weight_more, out, out_more, count, heads, all_heads, x_stride,
    x_more_stride, out_stride, out_more_stride, size, eps, ADDS: tl.constexpr, MORE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Root mean square norm of some of `count` heads of rows.

    A row has `all_heads`; those from `heads` on are `x_more`'s, with `weight_more`.
    """
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row, head = (place // all_heads)[:, None], (place % all_heads)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (place < count)[:, None] & (column < size)
    given, to = x + row * x_stride + head * size, out + row * out_stride + head * size
    scale = weight + column
    if MORE:
        first, rest = head < heads, head - heads
        given = tl.where(first, given, x_more + row * x_more_stride + rest * size)
        to = tl.where(first, to, out_more + row * out_more_stride + rest * size)
        scale = tl.where(first, scale, weight_more + column)
    wide = tl.load(given + column, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        wide = added(wide, residual + row * size + column, inside)
    factor = tl.load(scale, mask=inside, other=0.0).to(tl.float32)
    tl.store(to + column, normed(wide, factor, size, eps).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotation_kernel(
    x, x_more, out, out_more, positions, cosines, sines, count, heads, all_heads, x_stride,
    x_more_stride, out_stride, out_more_stride, SIGN: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rotate the pairs (i, i + D/2) of some of `count` heads of rows; SIGN -1 rotates back.

    A row has `all_heads`; those from `heads` on are `x_more`'s.
    """
    place = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = place < count
    row, head = (place // all_heads)[:, None], (place % all_heads)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = known[:, None] & (column < HALF)
    position = tl.load(positions + place // all_heads, mask=known, other=0).to(tl.int64)
    angle = position[:, None] * HALF + column
    cosine = tl.load(cosines + angle, mask=inside, other=0.0)
    sine = tl.load(sines + angle, mask=inside, other=0.0) * SIGN
    is_first, rest = head < heads, head - heads
    given = x + row * x_stride + head * (2 * HALF)
    given = tl.where(is_first, given, x_more + row * x_more_stride + rest * (2 * HALF))
    to = out + row * out_stride + head * (2 * HALF)
    to = tl.where(is_first, to, out_more + row * out_more_stride + rest * (2 * HALF))
    first = tl.load(given + column, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(given + HALF + column, mask=inside, other=0.0).to(tl.float32)
    kind = out.dtype.element_ty
    tl.store(to + column, (first * cosine - second * sine).to(kind), mask=inside)
    tl.store(to + HALF + column, (second * cosine + first * sine).to(kind), mask=inside)


@triton.jit
def silu_kernel(gate, up, out, size, gate_stride, up_stride, out_stride, BLOCK: tl.constexpr):
    """Sigmoid-weighted unit of a part of one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    wide = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    other = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    value = gated(wide, other).to(out.dtype.element_ty)
    tl.store(out + row * out_stride + column, value, mask=inside)


@triton.jit
def groups_kernel(codes, scales, out, count, group, BLOCK: tl.constexpr):
    """What codes stand for, `group` of which share a scale."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    code = tl.load(codes + at, mask=inside, other=0).to(tl.float32)
    scale = tl.load(scales + at // group, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, (code * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit
def softmax_kernel(
    logits, temperature, total, entropy, columns, stride, SAME: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logarithm of the sum of exponentials of logits / temperature of one row, and the entropy."""
    row = tl.program_id(0).to(tl.int64)
    divisor = tl.load(temperature) if SAME else tl.load(temperature + row)
    column = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + column
        value = tl.load(logits + row * stride + at, mask=at < columns, other=-float("inf"))
        top = tl.maximum(top, tl.div_rn(value.to(tl.float32), divisor))
    highest = tl.max(top, axis=0)
    shares = tl.zeros((BLOCK,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + column
        value = tl.load(logits + row * stride + at, mask=at < columns, other=-float("inf"))
        below = tl.div_rn(value.to(tl.float32), divisor) - highest
        share = tl.exp(below)
        shares += share
        weighted += tl.where(share > 0, share * below, 0.0)
    whole = tl.sum(shares, axis=0)
    tl.store(total + row, highest + tl.log(whole))
    tl.store(entropy + row, tl.log(whole) - tl.sum(weighted, axis=0) / whole)


@triton.jit
def attention_kernel(
    q, k, v, out, total, own_ends, seen_ends, seen_rows, scale, rows, q_stride, k_stride, v_stride,
    GATHERS: tl.constexpr, SHARED: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Causal attention of a tile of one sequence's queries.

    A row of the tile is a query and one of the `SHARED` heads that have the keys in common. The
    keys are met `KEYS` at a time, in their order; those beyond a row's own place add exact zeros.
    """
    sequence, group = tl.program_id(0), tl.program_id(1)
    own_start = tl.load(own_ends + sequence)
    own = tl.load(own_ends + sequence + 1) - own_start
    first = tl.program_id(2) * ROWS
    if first >= own * SHARED:
        return
    seen_start = tl.load(seen_ends + sequence).to(tl.int64)
    seen = tl.load(seen_ends + sequence + 1) - seen_start
    row = first + tl.arange(0, ROWS)
    query, head = row // SHARED, group * SHARED + row % SHARED
    valid = query < own
    place = seen - own + query
    column = tl.arange(0, SIZE)
    at = (own_start + query).to(tl.int64)
    asked = tl.load(
        q + at[:, None] * q_stride + head[:, None] * SIZE + column[None, :],
        mask=valid[:, None],
        other=0.0,
    )
    top = tl.full((ROWS,), -float("inf"), dtype=tl.float32)
    sums = tl.zeros((ROWS,), dtype=tl.float32)
    result = tl.zeros((ROWS, SIZE), dtype=tl.float32)
    last = tl.minimum(seen, seen - own + (first + ROWS - 1) // SHARED + 1)
    for start in range(0, last, KEYS):
        key = start + tl.arange(0, KEYS)
        known = key < last
        if GATHERS:
            source = tl.load(seen_rows + seen_start + key, mask=known, other=0).to(tl.int64)
        else:
            source = seen_start + key
        place_of_key = source[:, None] * k_stride + group * SIZE + column[None, :]
        keys = tl.load(k + place_of_key, mask=known[:, None], other=0.0)
        scores = tl.dot(asked, tl.trans(keys)) * scale
        scores = tl.where(key[None, :] <= place[:, None], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        shares = tl.exp2(scores - higher[:, None])
        shrunk = tl.exp2(top - higher)
        place_of_value = source[:, None] * v_stride + group * SIZE + column[None, :]
        values = tl.load(v + place_of_value, mask=known[:, None], other=0.0)
        sums = sums * shrunk + tl.sum(shares, axis=1)
        result = tl.dot(shares.to(values.dtype), values, result * shrunk[:, None])
        top = higher
    result = tl.div_rn(result, tl.broadcast_to(sums[:, None], (ROWS, SIZE)))
    heads = tl.num_programs(1) * SHARED
    to = out + (at[:, None] * heads + head[:, None]) * SIZE + column[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=valid[:, None])
    log_sum = (top + tl.log2(sums)) * 0.6931471805599453
    tl.store(total + head.to(tl.int64) * rows + at, log_sum, mask=valid)
