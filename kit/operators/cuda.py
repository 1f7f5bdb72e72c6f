"""The operators on a GPU: kernels of `kernels.py`, and libraries where these give their bits.

Each is an operator of torch's with a gradient, which `torch.compile` calls and does not look into:
what is compiled around it may be fused, what is in it may not. Gradients have to agree with nothing
and are computed as torch likes.

products    torch's library where `prove_products` has found it to give the bits of
            `product_kernel`, few rows filled up to where it does; that kernel for all other weights

Shapes: T rows, H query heads, G key heads, D head size.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn.functional import linear as library_product
from torch.nn.functional import pad

from kit.operators.rope import Angles

FEW = 256
"""Numbers of rows up to here are all compared."""
MANY = (
    *range(FEW + 256, 4097, 256),
    *(333, 777, 1500, 3333, 6000, 8192, 12345, 16384, 24000, 32768, 65536),
)
"""Those beyond."""
COMPARED = 1 << 20
"""Elements of products of each number of rows: another order of summation changes one in ten
thousand of them."""
MOST_TRIED = 1 << 28
"""Elements of a product that is compared, at most."""
MOST_FILLED = 256
"""Rows to which fewer are filled up, at most, for the library to compute them."""

PROVEN: dict[tuple[int, int], range] = {}
"""Shapes (N, K) of weights whose products torch's library computes, and for how many rows."""


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    plain: range | None = None,
) -> torch.Tensor:
    """Product of x (..., K) with weight (N, K), plus bias (N); (..., N).

    Args:
        x: the rows.
        weight: of each output.
        bias: of each output.
        plain: numbers of rows for which torch's own product may stand there for a compiler to see,
            which costs less than an operator that it cannot look into. Nothing may be added to
            such a product: a compiler would add before it rounds.
    """
    rows = x.reshape(-1, x.shape[-1])
    if plain is not None and bias is None and plain.start <= rows.shape[0] < plain.stop:
        whole = torch.mm(rows, weight.T)
    else:
        whole = product_op(rows, weight)
    whole = whole.view(*x.shape[:-1], weight.shape[0])
    return whole if bias is None else whole + bias


def plain_rows(shape: tuple[int, int]) -> range | None:
    """For how many rows torch's own product gives the kernel's bits; many only, or None."""
    proven = PROVEN.get(shape)
    return None if proven is None else range(MOST_FILLED, proven.stop)


@torch.library.custom_op("kit::shared_product", mutates_args=(), device_types="cuda")
def product_op(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Product of x (T, K) with weight (N, K); (T, N)."""
    return product(x, weight)


@product_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    of_x = gradient @ weight if ctx.needs_input_grad[0] else None
    of_weight = gradient.T @ x if ctx.needs_input_grad[1] else None
    return of_x, of_weight


product_op.register_autograd(_product_gradients, setup_context=_keep_product)


def product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `product_op`, without a gradient."""
    rows = len(x)
    proven = PROVEN.get((len(weight), weight.shape[1]))
    if proven is None:
        return kernel_product(x, weight)
    if rows in proven:
        return library_product(x, weight)
    if rows < proven.start:
        return library_product(pad(x, (0, 0, 0, proven.start - rows)), weight)[:rows]
    out = x.new_empty(rows, len(weight))
    for start in range(0, rows - rows % proven[-1], proven[-1]):
        part = slice(start, start + proven[-1])
        torch.mm(x[part], weight.T, out=out[part])
    if rest := rows % proven[-1]:
        out[-rest:] = product(x[-rest:], weight)
    return out


def kernel_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As `product`, by the kernel."""
    from kit.operators.kernels import product_kernel

    x = x if x.stride(-1) == 1 else x.contiguous()
    rows, columns = len(x), len(weight)
    out = x.new_empty(rows, columns)
    tile = 64
    grid = (-(-rows // tile), -(-columns // 128))
    product_kernel[grid](
        x,
        weight,
        out,
        rows,
        columns,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        ROWS=tile,
        COLUMNS=128,
        STEP=64,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out


def prove_products(
    shapes: set[tuple[int, int]], device: torch.device, most: int = MOST_TRIED
) -> set[tuple[int, int]]:
    """Let torch's library compute the products in which it gives the kernel's bits.

    Args:
        shapes: (N, K) of each weight.
        device: a GPU.
        most: elements of a product that is compared, at most.

    Returns:
        Those of the shapes that the kernel computes.
    """
    draw = torch.Generator(device).manual_seed(0)
    for shape in sorted(shapes - PROVEN.keys()):
        normal = partial(torch.randn, device=device, generator=draw, dtype=torch.bfloat16)
        weight, rows = normal(shape), min(most // max(shape), MANY[-1])
        counts = sorted(n for n in {*range(1, FEW + 1), *MANY, rows} if 0 < n <= rows)
        x = normal((rows, shape[1]))
        least = _least_equal(x, weight, counts)
        if 0 < least <= MOST_FILLED:
            PROVEN[shape] = range(least, rows + 1)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return shapes - PROVEN.keys()


def _least_equal(x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> int:
    """The number of rows from which on the library gives the kernel's bits; 0 where it does not."""
    whole, least = kernel_product(x, weight), 0
    for count in reversed(counts):
        times = min(max(1, COMPARED // (count * len(weight))), FEW, len(x) // count)
        parts = [slice(i * count, (i + 1) * count) for i in range(times)]
        found = torch.cat([library_product(x[part], weight) for part in parts])
        if not torch.equal(found, whole[: count * times]):
            break
        least = count
    return least


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm over the last dimension: x / sqrt(mean(x^2) + eps) * weight."""
    rows = x.reshape(-1, x.shape[-1])
    normed: torch.Tensor = norm_op(rows, weight, eps)
    return normed.view(x.shape)


@torch.library.custom_op("kit::shared_norm", mutates_args=(), device_types="cuda")
def norm_op(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Root mean square norm of each row of x (T, N)."""
    out = x.new_empty(x.shape)
    norm_into(out, x, weight, eps)
    return out


@norm_op.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x.new_empty(x.shape)


def norm_into(
    out: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> None:
    """Write the norm of each row of x (T, N), or of x + residual, which the residual then is."""
    _norm(out, out, x, x, weight, weight, eps, residual)


def norm_heads_into(
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
) -> None:
    """Write the norm of each head of q and k, rows of heads side by side; may be in place."""
    _norm(q_out, k_out, q, k, q_weight, k_weight, eps)


def _norm(
    out: torch.Tensor,
    out_more: torch.Tensor,
    x: torch.Tensor,
    x_more: torch.Tensor,
    weight: torch.Tensor,
    weight_more: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
) -> None:
    from kit.operators.kernels import norm_kernel

    size = len(weight)
    heads, more = x.shape[1] // size, x_more.shape[1] // size if x_more is not x else 0
    count, block = len(x) * (heads + more), power(size)
    rows = max(1, TILE // block)
    norm_kernel[(-(-count // rows),)](
        x,
        x_more,
        x if residual is None else residual,
        weight,
        weight_more,
        out,
        out_more,
        count,
        heads,
        heads + more,
        x.stride(0),
        x_more.stride(0),
        out.stride(0),
        out_more.stride(0),
        size,
        eps,
        ADDS=residual is not None,
        MORE=more > 0,
        ROWS=rows,
        BLOCK=block,
        num_warps=4 if block <= 2 * TILE else 8,
        enable_fp_fusion=False,
    )


TILE = 1024
"""Elements of a tile of rows, where several fit into one."""


def power(size: int) -> int:
    """The power of two that holds so many."""
    return 1 << max(0, size - 1).bit_length()


def _keep_norm(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _norm_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    x, weight = ctx.saved_tensors
    return *_norm_gradient(x, weight, gradient, ctx.eps), None


def _norm_gradient(
    x: torch.Tensor, weight: torch.Tensor, gradient: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of x (T, N) and of the weight."""
    wide, given = x.float(), gradient.float()
    inverse = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed, scaled = wide * inverse, given * weight.float()
    of_x = (scaled - normed * (scaled * normed).mean(-1, keepdim=True)) * inverse
    return of_x.to(x.dtype), (given * normed).sum(0).to(weight.dtype)


norm_op.register_autograd(_norm_gradients, setup_context=_keep_norm)


def rotate(
    q: torch.Tensor, k: torch.Tensor, angles: Angles, position_T: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each pair (i, i + D/2) of q (T, H, D) and k (T, G, D) by its position's angle."""
    turned = rotation_op(
        q.flatten(1), k.flatten(1), position_T, angles.cosines, angles.sines, back=False
    )
    return turned[0].view(q.shape), turned[1].view(k.shape)


@torch.library.custom_op("kit::shared_rotation", mutates_args=(), device_types="cuda")
def rotation_op(
    q: torch.Tensor,
    k: torch.Tensor,
    position_T: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    *,
    back: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate each head of q (T, H * D) and k (T, G * D) forth or back."""
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    rotate_into(*out, q, k, position_T, cosines, sines, back=back)
    return out


@rotation_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, *_: Any, back: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def rotate_into(
    q_out: torch.Tensor,
    k_out: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    position_T: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
    *,
    back: bool = False,
) -> None:
    """As `rotation_op`, into tensors that are there; may be in place."""
    from kit.operators.kernels import rotation_kernel

    half = cosines.shape[1]
    heads, more = q.shape[1] // (2 * half), k.shape[1] // (2 * half)
    count, block = len(q) * (heads + more), power(half)
    rows = max(1, TILE // block)
    rotation_kernel[(-(-count // rows),)](
        q,
        k,
        q_out,
        k_out,
        position_T,
        cosines,
        sines,
        count,
        heads,
        heads + more,
        q.stride(0),
        k.stride(0),
        q_out.stride(0),
        k_out.stride(0),
        SIGN=-1.0 if back else 1.0,
        HALF=half,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def _keep_rotation(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> None:
    ctx.save_for_backward(*inputs[2:])


def _rotation_gradients(
    ctx: Any, q_gradient: torch.Tensor, k_gradient: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    given = q_gradient.contiguous(), k_gradient.contiguous()
    return (*rotation_op(*given, *ctx.saved_tensors, back=True), None, None, None)


rotation_op.register_autograd(_rotation_gradients, setup_context=_keep_rotation)


def norm_and_rotate(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    angles: Angles,
    position_T: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of each head of q (T, H, D) and k (T, G, D), and then `rotate`."""
    turned = heads_op(
        q.flatten(1),
        k.flatten(1),
        q_weight,
        k_weight,
        eps,
        position_T,
        angles.cosines,
        angles.sines,
    )
    return turned[0].view(q.shape), turned[1].view(k.shape)


@torch.library.custom_op("kit::shared_heads", mutates_args=(), device_types="cuda")
def heads_op(
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    position_T: torch.Tensor,
    cosines: torch.Tensor,
    sines: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Norm and rotation of each head of q (T, H * D) and k (T, G * D)."""
    out = q.new_empty(q.shape), k.new_empty(k.shape)
    norm_heads_into(*out, q, k, q_weight, k_weight, eps)
    rotate_into(*out, *out, position_T, cosines, sines)
    return out


@heads_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _keep_heads(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.eps, position_T, cosines, sines = inputs
    ctx.save_for_backward(*tensors, position_T, cosines, sines)


def _heads_gradients(
    ctx: Any, q_gradient: torch.Tensor, k_gradient: torch.Tensor
) -> tuple[torch.Tensor | None, ...]:
    q, k, q_weight, k_weight, *turn = ctx.saved_tensors
    given = q_gradient.contiguous(), k_gradient.contiguous()
    given = rotation_op(*given, *turn, back=True)
    found = []
    for x, weight, gradient in ((q, q_weight, given[0]), (k, k_weight, given[1])):
        size = weight.shape[0]
        rows = x.reshape(-1, size), gradient.reshape(-1, size)
        of_x, of_weight = _norm_gradient(rows[0], weight, rows[1], ctx.eps)
        found.append((of_x.view(x.shape), of_weight))
    (of_q, of_q_weight), (of_k, of_k_weight) = found
    return of_q, of_k, of_q_weight, of_k_weight, None, None, None, None


heads_op.register_autograd(_heads_gradients, setup_context=_keep_heads)


def silu_and_multiply(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sigmoid-weighted unit: gate / (1 + exp(-gate)) * up."""
    rows = gate.reshape(-1, gate.shape[-1]), up.reshape(-1, up.shape[-1])
    value: torch.Tensor = silu_op(*rows)
    return value.view(gate.shape)


@torch.library.custom_op("kit::shared_silu", mutates_args=(), device_types="cuda")
def silu_op(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Sigmoid-weighted unit of gate and up, (T, N) each; their columns lie side by side."""
    return silu(gate, up)


def silu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `silu_op`, without a gradient."""
    from kit.operators.kernels import silu_kernel

    out, size = gate.new_empty(gate.shape), gate.shape[1]
    silu_kernel[(len(gate), -(-size // 1024))](
        gate,
        up,
        out,
        size,
        gate.stride(0),
        up.stride(0),
        out.stride(0),
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


@silu_op.register_fake
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return gate.new_empty(gate.shape)


def _silu_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = ctx.saved_tensors
    wide, given = gate.float(), gradient.float()
    share = wide.sigmoid()
    of_gate = given * up.float() * share * (1 + wide * (1 - share))
    return of_gate.to(gate.dtype), (given * wide * share).to(up.dtype)


silu_op.register_autograd(_silu_gradients, setup_context=_keep_product)


def read_groups(
    codes: torch.Tensor, scales: torch.Tensor, group: int, dtype: torch.dtype
) -> torch.Tensor:
    """What codes (N, K) stand for, of which `group` in a row share one of the scales."""
    from kit.operators.kernels import groups_kernel

    codes, scales = codes.contiguous(), scales.contiguous()
    out, count = torch.empty(codes.shape, dtype=dtype, device=codes.device), codes.numel()
    groups_kernel[(-(-count // 4096),)](codes, scales, out, count, group, BLOCK=4096, num_warps=8)
    return out


def log_sums(logits: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of the sum of exponentials of logits / temperature, and the distribution's entropy.

    Args:
        logits: (T, vocabulary).
        temperature: of each row, or one of all; float32.

    Returns:
        Both (T), float32.
    """
    from kit.operators.kernels import softmax_kernel

    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    total, entropy = (logits.new_empty(len(logits), dtype=torch.float32) for _ in range(2))
    softmax_kernel[(len(logits),)](
        logits,
        temperature,
        total,
        entropy,
        logits.shape[1],
        logits.stride(0),
        SAME=temperature.numel() == 1,
        BLOCK=4096,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return total, entropy


def log_softmax(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """Logarithm of the softmax of logits / temperature, (T, vocabulary), float32; no gradient."""
    total, _ = log_sums(logits, temperature)
    whole = logits.to(torch.float32, copy=True)
    return whole.div_(temperature.view(-1, 1)).sub_(total[:, None])


def log_probs_of(
    logits: torch.Tensor,
    chosen_T: torch.Tensor,
    temperature: torch.Tensor,
    total_T: torch.Tensor | None = None,
) -> torch.Tensor:
    """The chosen tokens' numbers of `log_softmax`, (T); `total_T` is the first of `log_sums`."""
    total = log_sums(logits, temperature)[0] if total_T is None else total_T
    value = logits.gather(-1, chosen_T[:, None])[:, 0].float()
    return value / temperature.view(-1) - total
