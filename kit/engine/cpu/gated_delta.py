"""Gated delta networks for SGLang on a CPU: the layers of linear attention of Qwen3-Next.

A layer keeps two states of a request instead of keys and values: the last inputs of its
convolution, and a matrix a head. SGLang hands both pools in and has their slots written. The rule
itself is Transformers', in chunks for prompts and step by step for one token; its matrix is (K, V),
SGLang's is (V, K).

Shapes: B requests, T tokens of all, C channels, H key heads, HV value heads, K and V their sizes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def convolve(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    conv_states: torch.Tensor | None = None,
    has_initial_state: torch.Tensor | None = None,
    cache_indices: torch.Tensor | None = None,
    query_start_loc: torch.Tensor | None = None,
    seq_lens_cpu: Any = None,
) -> torch.Tensor:
    """Causal convolution of prompts, channel by channel, (C, T); the states are written.

    Args:
        x: inputs of all requests one after the other, (C, T).
        weight: (C, width).
        bias: (C); None without.
        activation: `silu` or None.
        conv_states: the last width - 1 inputs of each slot, (slots, C, width - 1).
        has_initial_state: whether a request's slot has any yet, (B).
        cache_indices: slot of each request, (B).
        query_start_loc: where each request begins, and the end, (B + 1).
        seq_lens_cpu: not used.
    """
    assert conv_states is not None
    assert has_initial_state is not None
    assert cache_indices is not None
    assert query_start_loc is not None
    ends, slots, kept = query_start_loc.tolist(), cache_indices.tolist(), weight.shape[1] - 1
    outputs = []
    for number, slot in enumerate(slots):
        own = x[:, ends[number] : ends[number + 1]]
        before = conv_states[slot, :, -kept:].to(own.dtype)
        if not has_initial_state[number]:
            before = torch.zeros_like(before)
        row = torch.cat((before, own), dim=1)
        conv_states[slot] = row[:, -kept:].to(conv_states.dtype)
        outputs.append(functional.conv1d(row[None], weight[:, None], bias, groups=len(weight))[0])
    whole = torch.cat(outputs, dim=1)
    return functional.silu(whole) if activation == "silu" else whole


def convolve_one(
    x: torch.Tensor,
    conv_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str | None = None,
    conv_state_indices: torch.Tensor | None = None,
) -> torch.Tensor:
    """As `convolve` of one new token a request: x and the result are (B, C)."""
    assert conv_state_indices is not None
    slots, kept = conv_state_indices.long(), weight.shape[1] - 1
    rows = torch.cat((conv_states[slots][..., -kept:].to(x.dtype), x[..., None]), dim=2)
    conv_states[slots] = rows[..., -kept:].to(conv_states.dtype)
    whole = (rows * weight).sum(-1)
    if bias is not None:
        whole = whole + bias
    return functional.silu(whole) if activation == "silu" else whole


def gates(
    log_decay: torch.Tensor, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logarithm of what is kept of a state, and how much of a new value is taken: (1, T, HV)."""
    decay = -log_decay.float().exp() * functional.softplus(a.float() + bias.float())
    return decay[None], torch.sigmoid(b.float())[None]


def read(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor,
    cu_seqlens: torch.Tensor,
    initial_state_indices: torch.Tensor,
    **_: Any,
) -> tuple[torch.Tensor, None, None]:
    """The rule for prompts, (1, T, HV, V); the slots' states are read and written.

    Args:
        q: (1, T, H, K).
        k: as q.
        v: (1, T, HV, V).
        g: logarithm of what is kept, (1, T, HV).
        beta: how much of a new value is taken, (1, T, HV).
        initial_state: (slots, HV, V, K).
        cu_seqlens: where each request begins, and the end, (B + 1).
        initial_state_indices: slot of each request, (B).
    """
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    q, k = _for_each_value(q, k, v)
    outputs, ends = [], cu_seqlens.tolist()
    for number, slot in enumerate(initial_state_indices.tolist()):
        part = slice(ends[number], ends[number + 1])
        out, state = torch_chunk_gated_delta_rule(
            *(x[:, part] for x in (q, k, v, g, beta)),
            initial_state=initial_state[slot][None].transpose(-1, -2),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        initial_state[slot] = state[0].transpose(-1, -2).to(initial_state.dtype)
        outputs.append(out)
    return torch.cat(outputs, dim=1), None, None


def write(
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    initial_state_source: torch.Tensor,
    initial_state_indices: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """The rule for one new token a request: as `read`, with T = B, and gates not made yet."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    slots = initial_state_indices.long()
    g, beta = gates(A_log, a, b, dt_bias)
    q, k = _for_each_value(q, k, v)
    out, state = torch_recurrent_gated_delta_rule(
        *(x.transpose(0, 1) for x in (q, k, v, g, beta)),  # one token of each request
        initial_state=initial_state_source[slots].transpose(-1, -2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    initial_state_source[slots] = state.transpose(-1, -2).to(initial_state_source.dtype)
    turned: torch.Tensor = out.transpose(0, 1)
    return turned


def _for_each_value(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and k once for each value head."""
    times = v.shape[2] // q.shape[2]
    return q.repeat_interleave(times, dim=2), k.repeat_interleave(times, dim=2)


def gated_norm(
    x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor, eps: float
) -> torch.Tensor:
    """The root mean square norm, times the weight, times the SiLU of a gate."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * wide.to(x.dtype) * functional.silu(gate.float())).to(x.dtype)
