"""What SGLang does on a GPU only, or slowly on a CPU, done for a CPU; read from SGLang 0.5.16.

norm and rotation    in fewer torch calls. Without its compiled kernels SGLang falls back on plain
                     torch code, some ten calls each; for a small model the calls cost more than the
                     arithmetic. These need half as many; results differ by rounding only.
record of experts    in plain memory: SGLang pins it, which needs a GPU.
checksums            without the wait for a GPU that SGLang's begin and end with.
KV cache             on pages that are taken as they are used. SGLang fills it with zeros; memory of
                     the operating system is zero, and is given when it is first touched: of the
                     tiny model's 128 MiB a rollout touches a few.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from types import ModuleType
from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.mem_cache import memory_pool
from sglang.srt.state_capturer import base
from sglang.srt.utils import weight_checker

sglang_norm_forward = RMSNorm.forward_native
sglang_rotary_forward = RotaryEmbedding.forward_native


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


def norm_forward(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`RMSNorm.forward_native` in fewer operators, where all is float32."""
    plain = (
        x.dtype is self.weight.dtype is torch.float32
        and (residual is None or residual.dtype is torch.float32)
        and post_residual_addition is None
        and self.variance_size_override is None
        and self.override_orig_dtype is None
        and x.shape[-1] == self.hidden_size
    )
    if not plain:
        whole: torch.Tensor | tuple[torch.Tensor, torch.Tensor] = sglang_norm_forward(
            self, x, residual, post_residual_addition
        )
        return whole
    if residual is None:
        return rms_norm(x, self.weight, self.variance_epsilon)
    total = x + residual
    return rms_norm(total, self.weight, self.variance_epsilon), total


def rotary_forward(
    self: Any,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    offsets: torch.Tensor | None = None,
    fused_set_kv_buffer_arg: Any = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`RotaryEmbedding.forward_native` in fewer operators, where all is float32."""
    plain = (
        query.dtype is key.dtype is self.cos_sin_cache.dtype is torch.float32
        and offsets is None
        and fused_set_kv_buffer_arg is None
        and self.is_neox_style
        and self.rotary_dim == self.head_size
        and not hasattr(self, "sin_cos_cache")
    )
    if not plain:
        whole: tuple[torch.Tensor, torch.Tensor] = sglang_rotary_forward(
            self, positions, query, key, offsets, fused_set_kv_buffer_arg
        )
        return whole
    cos, sin = self.cos_sin_cache.index_select(0, positions.flatten()).chunk(2, dim=-1)
    heads = [x.reshape(len(cos), -1, self.head_size) for x in (query, key)]
    rotated = rotate(torch.cat(heads, dim=1), cos, sin)
    parts = rotated.split([x.shape[1] for x in heads], dim=1)
    return parts[0].reshape(query.shape), parts[1].reshape(key.shape)


def register_operators() -> None:
    """Use `norm_forward` and `rotary_forward` in models that this process makes afterwards."""
    RMSNorm.forward_native = norm_forward
    RotaryEmbedding.forward_native = rotary_forward


def init_host_cache(self: Any, num_tokens: int, num_layers: int, topk_size: int, name: str) -> None:
    """`BaseHostCache.__init__` without pinned memory."""
    self.buffer = torch.zeros((num_tokens, num_layers, topk_size), dtype=torch.int32)
    self.num_tokens, self.num_layers, self.topk_size = num_tokens, num_layers, topk_size
    self.name = name


def compute_checksum(self: Any) -> dict[str, Any]:
    """`WeightChecker._compute_checksum` without a GPU to wait for."""
    checksums = {
        name: weight_checker._hash_tensor(value)
        for name, value in self._model_state()
        if not weight_checker._is_non_persistent_buffer_name(name)
    }
    everything = "".join(f"{name}{checksums[name]}" for name in sorted(checksums))
    info: dict[str, Any] = weight_checker.ChecksumInfo(
        checksums=checksums,
        per_gpu_checksum=hashlib.sha256(everything.encode()).hexdigest(),
        parallelism_info=self._parallelism_info(),
    ).model_dump()
    return info


MIN_BYTES = 1 << 20
"""Smaller tensors are made as usual."""


class TorchOnFreshPages(ModuleType):
    """Stands for `torch` in SGLang's module of memory pools."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*sizes: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        """A tensor of zeros on pages that nobody has touched."""
        sizes = sizes or (kwargs.pop("size"),)
        shape = tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        wanted = dtype or torch.get_default_dtype()
        count = math.prod(shape) * wanted.itemsize
        if count < MIN_BYTES or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return torch.zeros(shape, dtype=wanted, **kwargs)
        pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=wanted).reshape(shape)


def register() -> None:
    """Put all of this in place of SGLang's own in this process."""
    register_operators()
    base.BaseHostCache.__init__ = init_host_cache
    weight_checker.WeightChecker._compute_checksum = compute_checksum
    memory_pool.torch = TorchOnFreshPages("torch")
