"""Mixtures of experts on a GPU: which experts a row takes, and their weighted sum.

Rows are sorted by expert, and every product is summed in the order of `product_kernel`: how many
rows an expert has changes no bit of any of them. As in `cuda.py`, gradients are computed as torch
likes, by the library's grouped products.

Shapes: T rows, E experts, K experts of a row, N columns within an expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import grouped_mm, silu

from kit.operators import cuda

ROWS = 64
"""Of a tile."""


def route(
    logits: torch.Tensor, top_k: int, *, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each row, by number, and their weights, (T, K) each; weights are float32.

    Args:
        logits: of each expert, (T, E).
        top_k: experts of a row.
        normalizes: whether a row's weights are made to sum to 1.
    """
    weights, chosen = route_op(logits, top_k, normalizes)
    return weights, chosen


@torch.library.custom_op("kit::shared_route", mutates_args=(), device_types="cuda")
def route_op(
    logits: torch.Tensor, top_k: int, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`."""
    return choose(logits, top_k, normalizes=normalizes)


def choose(
    logits: torch.Tensor, top_k: int, *, normalizes: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `route`, without a gradient."""
    from kit.operators.kernels import route_kernel

    rows, experts = logits.shape
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    # Zeros, for rows that are no numbers: these choose nothing.
    weights = logits.new_zeros(rows, top_k, dtype=torch.float32)
    chosen = logits.new_zeros(rows, top_k, dtype=torch.int64)
    if rows:
        route_kernel[(rows,)](
            logits,
            weights,
            chosen,
            experts,
            logits.stride(0),
            TOP=top_k,
            NORMALIZES=normalizes,
            BLOCK=cuda.power(experts),
            num_warps=1,
            enable_fp_fusion=False,
        )
    return weights, chosen


@route_op.register_fake
def _(logits: torch.Tensor, top_k: int, normalizes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    shape = logits.shape[0], top_k
    return logits.new_empty(shape, dtype=torch.float32), logits.new_empty(shape, dtype=torch.int64)


def _keep_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, _top_k, ctx.normalizes = inputs
    ctx.save_for_backward(logits, output[1])


def _route_gradients(
    ctx: Any, gradient: torch.Tensor, _: torch.Tensor
) -> tuple[torch.Tensor, None, None]:
    logits, chosen = ctx.saved_tensors
    return gradient_of_logits(logits, chosen, gradient, ctx.normalizes), None, None


def gradient_of_logits(
    logits: torch.Tensor, chosen: torch.Tensor, gradient: torch.Tensor, normalizes: bool
) -> torch.Tensor:
    """Gradient of the logits (T, E), given that of the chosen experts' weights (T, K)."""
    shares = logits.to(gradient.dtype).softmax(-1)
    if normalizes:
        taken = shares.gather(-1, chosen)
        whole = taken.sum(-1, keepdim=True)
        gradient = (gradient - (gradient * taken / whole).sum(-1, keepdim=True)) / whole
    of_shares = torch.zeros_like(shares).scatter_add_(-1, chosen, gradient)
    of_logits = shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
    return of_logits.to(logits.dtype)


route_op.register_autograd(_route_gradients, setup_context=_keep_route)


@torch.library.custom_op("kit::shared_experts", mutates_args=(), device_types="cuda")
def experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """Weighted sum of the gated units of each row's experts, in the order of `chosen`; (T, H).

    Args:
        x: (T, H).
        gate_up: the stacked first weights of each expert, (E, 2 N, H).
        down: its last weight, (E, H, N).
        weights: of each row's experts, (T, K), float32.
        chosen: their numbers, (T, K).
    """
    return compute(x, gate_up, down, weights, chosen)


def compute(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """As `experts`, without a gradient."""
    from kit.operators.kernels import weighted_sum_kernel

    rows, top_k = chosen.shape
    out = x.new_empty(rows, down.shape[1])
    if not rows:
        return out
    order, ends = by_expert(chosen, len(down))
    places = torch.arange(len(order), device=x.device)
    both = products(x, gate_up, order // top_k, places, ends)
    inner = cuda.silu(*both.chunk(2, dim=1))
    parts = products(inner, down, places, order, ends)
    size = out.shape[1]
    weighted_sum_kernel[(rows, -(-size // 1024))](
        parts,
        weights.contiguous(),
        out,
        size,
        EXPERTS=top_k,
        BLOCK=1024,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def by_expert(chosen: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of `chosen` (T, K) sorted by expert, and where each expert's end, from 0 on.

    An unknown expert, as SGLang marks rows that only fill a graph up, counts as the first.
    """
    numbers, order = chosen.flatten().clamp(min=0).sort(stable=True)
    edges = torch.arange(experts + 1, device=chosen.device, dtype=numbers.dtype)
    return order, torch.searchsorted(numbers, edges, out_int32=True)


def products(
    x: torch.Tensor,
    weight: torch.Tensor,
    takes: torch.Tensor,
    puts: torch.Tensor,
    ends: torch.Tensor,
) -> torch.Tensor:
    """Products of rows sorted by expert with its weight (E, N, H): row i is `x[takes[i]]`.

    The product of row i is row `puts[i]` of what is returned.
    """
    from kit.operators.kernels import experts_kernel

    count, columns = len(weight), weight.shape[1]
    x = x if x.stride(-1) == 1 else x.contiguous()
    out = x.new_empty(len(takes), columns)
    tiles = (ends.diff() + (ROWS - 1)) // ROWS
    tile_ends = torch.nn.functional.pad(tiles.cumsum(0, dtype=torch.int32), (1, 0))
    most = min(len(takes), len(takes) // ROWS + count)
    experts_kernel[(most, -(-columns // 128))](
        x,
        weight,
        out,
        takes,
        puts,
        ends,
        tile_ends,
        count,
        columns,
        x.shape[1],
        x.stride(0),
        weight.stride(0),
        weight.stride(1),
        ROWS=ROWS,
        COLUMNS=128,
        STEP=64,
        EXPERTS=cuda.power(count),
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=False,
    )
    return out


@experts.register_fake
def _(x: torch.Tensor, _gate_up: torch.Tensor, down: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], down.shape[1])


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _expert_gradients(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *inputs, chosen = ctx.saved_tensors
    leaves = [part.detach().requires_grad_() for part in inputs]
    x, gate_up, down, weights = leaves
    with torch.enable_grad():
        out = by_library(x, gate_up, down, weights, chosen)
    return *torch.autograd.grad(out, leaves, gradient), None


def by_library(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
) -> torch.Tensor:
    """As `experts` by the library's grouped products, whose bits depend on how rows lie."""
    rows, top_k = chosen.shape
    order, ends = by_expert(chosen, len(down))
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
    given = x[:, None].expand(-1, top_k, -1).flatten(0, 1)
    given = given.index_select(0, order)
    both = grouped_mm(given, gate_up.transpose(1, 2), offs=ends[1:])
    gate, up = both.chunk(2, dim=1)
    inner = (silu(gate.float()) * up.float()).to(x.dtype)
    parts = grouped_mm(inner, down.transpose(1, 2), offs=ends[1:])
    parts = parts.index_select(0, back).view(rows, top_k, -1)
    return torch.einsum("tkh,tk->th", parts.float(), weights).to(x.dtype)


experts.register_autograd(_expert_gradients, setup_context=_keep_experts)
