"""Causal attention over packed samples, registered with Transformers as `kit_packed`.

On a GPU this is torch's variable-length flash attention, on a CPU one padded call for all samples.
A prefix that samples share is computed once, and each of them attends to it. `attend` takes tensors
in Transformers' shapes: (1, heads, T, head size). Soft caps and sinks, which these kernels lack,
are computed on both by `kit.operators.scores`.

`forward_op` and `backward_op` wrap the GPU's kernels as operators that `torch.compile` does not
look into. Torch's own take the longest lengths as numbers, so compiled code would depend on them;
here they are a tensor on the host. Grouped queries need no copies of keys and values.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.attention.varlen  # registers the operators of torch.ops.torch_attn
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from kit.models.packing import Packed, put_rows, repeat_rows, sums_of, take_rows, to_device
from kit.operators import scores

NAME = "kit_packed"
OF_MODULE = -1
"""A window of which the caller says nothing: Qwen2-MoE has it in its masks and in its layers."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of sequences that lie one after the other."""

    longest: int
    ends: torch.Tensor
    """Cumulative lengths with a leading 0, int32: what variable-length kernels take."""
    places: torch.Tensor
    """Place of each token in the flattened padded batch; empty where nothing is padded."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each sequence lies in the row; computed once for all layers."""

    sequences: int
    own: Lengths
    """Lengths on the query side: each row once."""
    seen: Lengths
    """Lengths on the key side: a shared prefix is seen by several sequences."""
    limits: torch.Tensor
    """Longest own and longest seen, as a tensor of two on the host: code that is compiled for one
    batch serves all others, because no number of them is part of it."""
    seen_rows: torch.Tensor | None = None
    """Row of each token seen; on a CPU of each place of the padded batch. None: nothing is shared,
    the rows are the sequences."""
    visible: torch.Tensor | None = None
    """CPU, something shared: which token each token sees, (sequences, 1, own, seen)."""
    order: torch.Tensor | None = None
    """GPU, something shared: places of what is seen, sorted by row; see `packing.sums_of`."""
    order_ends: torch.Tensor | None = None
    """Where each row's places end in it."""


def layout(packed: Packed, device: torch.device) -> Layout:
    """Layout of packed samples for this device's attention."""
    if device.type == "cuda":
        return gathered(packed, device)
    own, count = _lengths(packed.own_lengths, device), len(packed.own_lengths)
    rows = packed.seen_rows
    if rows is None:
        return Layout(count, own, own, torch.tensor([own.longest, own.longest]))
    seen = _lengths(packed.seen_lengths, device)
    padded = put_rows(rows, seen.places, count * seen.longest)  # padding: any row
    own_S, seen_S = (
        torch.tensor(x, device=device) for x in (packed.own_lengths, packed.seen_lengths)
    )
    asking = torch.arange(own.longest, device=device) + (seen_S - own_S)[:, None]
    visible = torch.arange(seen.longest, device=device) <= asking[:, :, None]
    limits = torch.tensor([own.longest, seen.longest])
    return Layout(count, own, seen, limits, padded, visible[:, None])


def gathered(packed: Packed, device: torch.device) -> Layout:
    """Layout for variable-length attention, without padding."""
    own, count = _ends(packed.own_lengths, device), len(packed.own_lengths)
    if packed.seen_rows is None:
        return Layout(count, own, own, torch.tensor([own.longest, own.longest]))
    seen = _ends(packed.seen_lengths, device)
    limits = torch.tensor([own.longest, seen.longest])
    order, ends = sums_of(packed.seen_rows, len(packed.tokens_T))
    return Layout(count, own, seen, limits, packed.seen_rows, order=order, order_ends=ends)


def _ends(lengths: tuple[int, ...], device: torch.device) -> Lengths:
    ends = torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)
    return Lengths(max(lengths), to_device(ends, device), torch.empty(0, dtype=torch.long))


def _lengths(lengths: tuple[int, ...], device: torch.device) -> Lengths:
    sequences, longest = _ends(lengths, device), max(lengths)
    length_S = torch.tensor(lengths, device=device)
    sequence_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), length_S)
    within_T = torch.arange(len(sequence_T), device=device) - sequences.ends[:-1][sequence_T]
    return Lengths(longest, sequences.ends, sequence_T * longest + within_T)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Layout | None = None,
    sliding_window: int | None = OF_MODULE,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attend from each token to the earlier ones of its sample. Returns ((1, T, heads, D), None).

    With a sliding window of w, these are the token itself and the w - 1 before it.

    Raises:
        ValueError: called without the layout of the packed samples, or with dropout where there is
            none.
    """
    if packed is None:
        raise ValueError("kit_packed attention needs packed=layout(samples, device)")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    size = v.shape[-1]
    if size < k.shape[-1]:  # kernels take one head size; columns of zeros stay zeros
        v = nn.functional.pad(v, (0, k.shape[-1] - size))
    if packed.seen_rows is not None:
        # One gather of both: what each sequence sees, the shared beginnings repeated.
        both = torch.cat([k, v], dim=1)
        both = repeat_rows(both, packed.seen_rows, packed.order, packed.order_ends)
        k, v = both.split([k.shape[1], v.shape[1]], dim=1)
    if sliding_window == OF_MODULE:
        sliding_window = getattr(module, "sliding_window", None)
    window = sliding_window or 0
    if softcap is not None or s_aux is not None:
        out = _attend_by_scores(q, k, v, s_aux, scaling, dropout, packed, window, softcap or 0.0)
    else:
        attended = attend_on_gpu if q.is_cuda else attend_on_cpu
        out = attended(q, k, v, scaling, dropout, packed, window)
    return out[None, ..., :size], None


def _attend_by_scores(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    packed: Layout,
    window: int,
    cap: float,
) -> torch.Tensor:
    """Attention with a soft cap or sinks, of which no kernel knows, (T, heads, D)."""
    if dropout:
        raise ValueError("kit_packed attention has no dropout beside soft caps and sinks")
    if not q.is_cuda and packed.seen_rows is not None:  # padded to a rectangle
        k, v = (take_rows(x, packed.seen.places) for x in (k, v))
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    ends = packed.own.ends, packed.seen.ends
    out: torch.Tensor = scores.attend(q, k, v, sinks, *ends, scale, window, cap)
    return out


def attend_on_gpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    packed: Layout,
    window: int = 0,
) -> torch.Tensor:
    """Attention of packed sequences in one kernel, (T, heads, D)."""
    if dropout:
        raise ValueError("kit_packed attention has no dropout on a GPU")
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    ends = packed.own.ends, packed.seen.ends
    out: torch.Tensor
    out, _ = forward_op(q, k, v, *ends, packed.limits, scale, window)
    return out


def attend_on_cpu(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scaling: float | None,
    dropout: float,
    packed: Layout,
    window: int = 0,
) -> torch.Tensor:
    """Attention of packed sequences, padded to a rectangle, (T, heads, D)."""

    def heads_first(x: torch.Tensor, lengths: Lengths) -> torch.Tensor:
        return padded(x, packed.sequences, lengths).transpose(1, 2)

    visible = packed.visible
    if 0 < window < packed.seen.longest:
        visible = _within_window(packed, window)
    out: torch.Tensor = scaled_dot_product_attention(
        heads_first(q, packed.own),
        heads_first(k, packed.seen),
        heads_first(v, packed.seen),
        attn_mask=visible,
        is_causal=visible is None,  # then padding is where no token looks
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=True,
    )
    return take_rows(out.transpose(1, 2).flatten(0, 1), packed.own.places)


def padded(x: torch.Tensor, sequences: int, lengths: Lengths) -> torch.Tensor:
    """Pad rows (T, heads, D) to (sequences, longest, heads, D), at the end of each sequence."""
    size = sequences * lengths.longest
    whole = x if len(x) == size else put_rows(x, lengths.places, size)
    return whole.view(sequences, lengths.longest, *x.shape[1:])


def by_sequence(model: nn.Module, kinds: Collection[str]) -> None:
    """Have layers that carry a state along a sequence compute one sequence of each sample apart.

    Where samples share a beginning it is computed for each of them.

    Args:
        model: a Transformers model.
        kinds: names of their classes.
    """
    for module in model.modules():
        if type(module).__name__ in kinds:
            kind: Any = type(module)
            module.__class__ = _sequence_by_sequence(kind)


@cache
def _sequence_by_sequence(kind: Any) -> Any:
    """Subclass that computes sequences as a batch, padded at their ends, where no state looks."""

    def forward(
        self: Any, hidden_states: torch.Tensor, *args: Any, packed: Layout, **kwargs: Any
    ) -> torch.Tensor:
        rows, own = rectangle(packed)
        batch = repeat_rows(hidden_states[0], rows.flatten()).unflatten(0, rows.shape)
        out = kind.forward(self, batch, *args, **kwargs)
        return take_rows(out.flatten(0, 1), own)[None]

    return type(kind.__name__, (kind,), {"forward": forward})


def rectangle(packed: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Row of each place in a batch of what sequences see, (S, longest), and place of each row.

    Past a sequence's end its last row stands in.
    """
    own, seen = packed.own.ends.long(), packed.seen.ends.long()
    place = torch.arange(packed.seen.longest, device=seen.device)
    inside = torch.minimum(seen[:-1, None] + place, seen[1:, None] - 1)
    if packed.seen_rows is not None:
        rows = packed.seen_rows
        if len(packed.seen.places):  # on a CPU padded already
            rows = rows[packed.seen.places]
        inside = rows[inside]
    row = torch.arange(int(own[-1]), device=own.device)
    sequence = torch.searchsorted(own, row, right=True) - 1
    last = seen[sequence + 1] - seen[sequence] - (own[sequence + 1] - row)
    return inside, sequence * packed.seen.longest + last


def _within_window(packed: Layout, window: int) -> torch.Tensor:
    """Which token each token sees through a window, (sequences or 1, 1, own, seen)."""
    device = packed.own.ends.device
    own, seen = (x.ends.diff()[:, None] for x in (packed.own, packed.seen))
    place = torch.arange(packed.own.longest, device=device) + (seen - own)
    distance = place[:, :, None] - torch.arange(packed.seen.longest, device=device)
    # Padding sees its own place at least: rows without any are not numbers.
    return ((distance >= 0) & (distance < window))[:, None]


def register() -> None:
    """Register `kit_packed` with Transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)


def _window(tokens: int) -> list[int]:
    """How many tokens before and after itself a token sees, as the kernel takes it; -1 is all.

    Counted from the end: a sequence's last token is at the end of what it sees.
    """
    return [tokens - 1 if tokens else -1, 0]


@torch.library.custom_op("kit::packed_attention", mutates_args=(), device_types="cuda")
def forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention within each sequence: (T, heads, D), and log-sum-exp of the scores.

    Args:
        q: (T, heads, D).
        k: (tokens seen, key heads, D); as many heads as q, or a divisor of them.
        v: as k.
        own_ends: cumulative lengths of the sequences in q, with a leading 0, int32.
        seen_ends: cumulative lengths of the sequences in k and v.
        limits: longest sequence in q and in k, on the host.
        scale: multiplies the products of queries and keys.
        window: a token sees so many, itself included; 0 is all before it.
    """
    own, seen = limits.tolist()
    out, total, _ = torch.ops.torch_attn._varlen_attn(
        q, k, v, own_ends, seen_ends, own, seen, True, scale, _window(window)
    )
    return out, total


@forward_op.register_fake
def _(q: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("kit::packed_attention_backward", mutates_args=(), device_types="cuda")
def backward_op(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of q, k and v; `out` and `total` are what `forward_op` has returned."""
    own, seen = limits.tolist()
    draws = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none
    dq, dk, dv = torch.ops.torch_attn._varlen_attn_backward(
        gradient.contiguous(),
        q,
        k,
        v,
        out,
        total,
        own_ends,
        seen_ends,
        own,
        seen,
        True,
        draws,
        scale,
        _window(window),
    )
    return dq, dk, dv


@backward_op.register_fake
def _(
    _gradient: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _gradients(ctx: Any, gradient: torch.Tensor, _: torch.Tensor) -> tuple[Any, ...]:
    q, k, v, own_ends, seen_ends, limits, out, total = ctx.saved_tensors
    inputs = gradient, q, k, v, out, total, own_ends, seen_ends, limits, ctx.scale, ctx.window
    return (*backward_op(*inputs), None, None, None, None, None)


forward_op.register_autograd(_gradients, setup_context=_keep)
