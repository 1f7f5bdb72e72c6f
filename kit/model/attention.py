"""Causal attention over packed samples, registered with Transformers as `kit_packed`.

On a GPU torch's own variable-length flash attention; on a CPU one padded call for all samples.
Tensors here have Transformers' shapes: (1, heads, T, head size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from kit.model.rows import put_rows, take_rows

NAME = "kit_packed"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each sample lies in the row; worked out once, used by every layer."""

    samples: int
    longest: int
    ends_N: torch.Tensor
    """Cumulative lengths with a leading 0, int32: what variable-length kernels take."""
    place_T: torch.Tensor
    """Place of each packed token in the flattened padded batch."""


def layout(lengths: tuple[int, ...], device: torch.device) -> Layout:
    """Work out the layout of samples of these lengths."""
    length_N = torch.tensor(lengths, device=device)
    end_N = length_N.cumsum(0)
    longest = max(lengths)
    sample_T = torch.repeat_interleave(torch.arange(len(lengths), device=device), length_N)
    within_T = torch.arange(len(sample_T), device=device) - (end_N - length_N)[sample_T]
    return Layout(
        samples=len(lengths),
        longest=longest,
        ends_N=torch.nn.functional.pad(end_N, (1, 0)).to(torch.int32),
        place_T=sample_T * longest + within_T,
    )


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed: Layout | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Each token attends to the earlier tokens of its own sample. Returns ((1, T, heads, D), None).

    Raises:
        ValueError: called without the layout of the packed samples.
    """
    if packed is None:
        raise ValueError("kit_packed attention needs packed=layout(lengths, device)")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
    if q.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        ends, longest = packed.ends_N, packed.longest
        out = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0))
        assert isinstance(out, torch.Tensor)
        return out[None], None
    shape = (packed.samples, packed.longest)
    q, k, v = (
        put_rows(x, packed.place_T, shape[0] * shape[1]).unflatten(0, shape).transpose(1, 2)
        for x in (q, k, v)
    )  # (N, heads, L, D); padding comes last, where no token looks
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, dropout_p=dropout, enable_gqa=True
    )
    return take_rows(out.transpose(1, 2).flatten(0, 1), packed.place_T)[None], None


def register() -> None:
    """Tell Transformers of `kit_packed`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, lambda *_, **__: None)
