"""SGLang's small layers in fewer torch calls.

On a CPU without its compiled kernels SGLang falls back on plain torch code, written to be read
beside the kernels: some ten calls for a norm or a rotation. For a small model the calls cost more
than the arithmetic. These do the same in half as many; results differ by rounding only.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

_norm_of_sglang = RMSNorm.forward_native
_rotation_of_sglang = RotaryEmbedding.forward_native


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """The root mean square norm over the last dimension: x / sqrt(mean(x^2) + eps) * weight."""
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (i, i + D/2) of x (T, heads, D) by its angle; cos and sin are (T, D/2)."""
    halves = x.unflatten(-1, (2, -1))
    signed = torch.stack((-sin, sin), dim=1)[:, None]  # the first half takes -sin of the second
    return torch.addcmul(halves * cos[:, None, None], halves.flip(-2), signed).flatten(-2)


def _norm(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    plain = (
        x.dtype is self.weight.dtype is torch.float32
        and (residual is None or residual.dtype is torch.float32)
        and post_residual_addition is None
        and self.variance_size_override is None
        and self.override_orig_dtype is None
        and x.shape[-1] == self.hidden_size
    )
    if not plain:
        whole: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = _norm_of_sglang(
            self, x, residual, post_residual_addition
        )
        return whole
    if residual is None:
        return rms_norm(x, self.weight, self.variance_epsilon)
    total = x + residual
    return rms_norm(total, self.weight, self.variance_epsilon), total


def _rotation(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    plain = (
        query.dtype is key.dtype is self.cos_sin_cache.dtype is torch.float32
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and self.is_neox_style
        and self.rotary_dim == self.head_size
        and not hasattr(self, "sin_cos_cache")
    )
    if not plain:
        whole: tuple[torch.Tensor, torch.Tensor] = _rotation_of_sglang(
            self, positions, query, key, offsets, fused_set_kv_buffer_arg
        )
        return whole
    cos, sin = self.cos_sin_cache.index_select(0, positions.flatten()).chunk(2, dim=-1)
    heads = [x.reshape(len(cos), -1, self.head_size) for x in (query, key)]
    rotated = rotate(torch.cat(heads, dim=1), cos, sin)
    parts = rotated.split([x.shape[1] for x in heads], dim=1)
    return parts[0].reshape(query.shape), parts[1].reshape(key.shape)


def register() -> None:
    """Use them in the SGLang of this process, for models that are made from now on."""
    RMSNorm.forward_native = _norm
    RotaryEmbedding.forward_native = _rotation
