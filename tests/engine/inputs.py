"""Queries, keys and values made ready by the kit's kernel and by SGLang's formulas.

Prints how far apart they are, line by line; `test_attention_inputs` compares. Triton's interpreter
cuts where a GPU rounds to bfloat16, so that these are float32.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.quantization.fp4_kv_cache_quant_method import UnquantizedKVCacheMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.rotary_embedding.mrope import MRotaryEmbedding
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, PageMajorMHATokenToKVPool
from sglang.srt.model_executor import forward_context
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from kit.engine.gpu import attention_inputs

TOKENS, PLACES = 5, torch.tensor([4, 9, 2, 0, 30])
POSITIONS = torch.tensor([0, 3, 7, 99, 20])
EPS = 1e-3


def table_of(size: int) -> torch.Tensor:
    """Cosines and sines of a hundred positions."""
    angles = torch.arange(100.0)[:, None] / 1e4 ** (torch.arange(0, size, 2) / size)
    return torch.cat([angles.cos(), angles.sin()], 1)


def expected(heads: torch.Tensor, weight: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Heads (T, H, D), normed and rotated."""
    heads = heads / (heads.square().mean(-1, keepdim=True) + EPS).sqrt() * weight
    (first, second), (cosine, sine) = heads.chunk(2, -1), table[POSITIONS][:, None].chunk(2, -1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference."""
    return float((one.float() - other.float()).abs().max())


def kernel(heads: int, shared: int, size: int, dtype: torch.dtype) -> None:
    """Compare the kernel's queries, keys and cache; values are numbers of e4m3."""
    qkv = torch.randn(TOKENS, heads + 2 * shared, size)
    qkv[:, -shared:] = torch.randint(-8, 8, (TOKENS, shared, size)) / 4
    table, weights = table_of(size), (1 + 0.1 * torch.randn(2, size)).unbind()
    keys, values = (torch.full((40, shared, size), 7.0).to(dtype) for _ in range(2))
    whole = qkv.clone().flatten(1)
    attention_inputs.make_ready(whole, POSITIONS, PLACES, table, weights, EPS, keys, values)
    q, k, v = whole.view(qkv.shape).split([heads, shared, shared], 1)
    own = qkv.split([heads, shared, shared], 1)
    others = torch.ones(40, dtype=torch.bool)
    others[PLACES] = False
    # The interpreter does not round to e4m3 as GPUs do.
    room = 0 if dtype is torch.float32 else k.abs() / 8 + 2**-9
    near = (keys[PLACES].float() - k).abs() <= room
    print(
        apart(q, expected(own[0], weights[0], table)),
        apart(k, expected(own[1], weights[1], table)),
        float(near.float().mean()),
        apart(values[PLACES], own[2]),
        apart(v, own[2]),
        int((keys[others].float() != 7).sum() + (values[others].float() != 7).sum()),
    )


class Attention:
    """What `Qwen3Attention` has that its forward pass needs, with plain weights."""

    head_dim, q_size, kv_size = 64, 2 * 64, 64

    def __init__(self) -> None:
        self.weight = torch.randn(4 * 64, 32) / 4
        self.rotary_emb = SimpleNamespace(cos_sin_cache=table_of(64))
        norms = [SimpleNamespace(weight=1 + 0.1 * torch.randn(64), variance_epsilon=EPS)] * 2
        self.q_norm, self.k_norm = norms
        self.seen: list[Any] = []

    def qkv_proj(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return x @ self.weight.T, None

    def attn(self, q: Any, k: Any, v: Any, batch: Any, **how: Any) -> torch.Tensor:
        self.seen += [q.clone(), k.clone(), how]
        return q

    attn.layer_id = 3  # type: ignore[attr-defined]

    def o_proj(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return 2 * x, None

    def forward(self, *_: Any) -> str:
        return "SGLang's"


def forward() -> None:
    """Compare the forward pass where tokens are written, and see whose it is elsewhere."""
    attention, pool = Attention(), SimpleNamespace()
    caches = {3: [torch.zeros(40, 1, 64) for _ in range(2)]}
    pool.get_kv_buffer = caches.__getitem__
    forward_context.get_token_to_kv_pool = lambda: pool
    attention_inputs.is_plain = lambda own: own is pool
    hidden = torch.randn(TOKENS, 32)
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, out_cache_loc=PLACES)
    out = attention_inputs.forward(attention, POSITIONS, hidden, batch)
    qkv = attention.qkv_proj(hidden)[0].view(TOKENS, 4, 64)
    q = expected(qkv[:, :2], attention.q_norm.weight, table_of(64))
    k = expected(qkv[:, 2:3], attention.k_norm.weight, table_of(64))
    print(
        apart(out, 2 * q.flatten(1)),
        apart(attention.seen[1].view(k.shape), k),
        apart(caches[3][0][PLACES], k),
        apart(caches[3][1][PLACES], qkv[:, 3:]),
        attention.seen[2] == {"save_kv_cache": False},
    )
    for batch.forward_mode in (ForwardMode.EXTEND, ForwardMode.TARGET_VERIFY):
        print(attention_inputs.forward(attention, POSITIONS, hidden, batch))
    batch.forward_mode = ForwardMode.DECODE
    forward_context.get_token_to_kv_pool = lambda: None
    print(attention_inputs.forward(attention, POSITIONS, hidden, batch))


def made(kind: type, **values: Any) -> Any:
    """An object of SGLang's with these values, and without what it needs to be made."""
    own = object.__new__(kind)
    if issubclass(kind, torch.nn.Module):
        torch.nn.Module.__init__(own)
    for name, value in values.items():
        setattr(own, name, value)
    return own


def fits(
    rotary: type = RotaryEmbedding, head_dim: int = 128, scale: float | None = None, **changes: Any
) -> bool:
    """Whether the kernel takes Qwen3's attention with these changes."""
    norm = {"weight": torch.ones(head_dim, dtype=torch.bfloat16), "variance_epsilon": EPS}
    angles: dict[str, Any] = {
        "use_fallback_kernel": False,
        "is_neox_style": True,
        "rotary_dim": head_dim,
        "head_size": head_dim,
        "cos_sin_cache": torch.zeros(4, head_dim),
    }
    own = {name: changes[name] for name in angles if name in changes}
    more = {name: changes[name] for name in norm if name in changes}
    attention = SimpleNamespace(
        head_dim=head_dim,
        q_norm=made(RMSNorm, **norm),
        k_norm=made(RMSNorm, **norm | more),
        rotary_emb=made(rotary, **angles | own),
        attn=SimpleNamespace(k_scale=scale, v_scale=None),
    )
    return attention_inputs.fits(attention)


def is_plain(kind: type = MHATokenToKVPool, **changes: Any) -> bool:
    """Whether the kernel takes a cache with these changes."""
    values = {
        "kv_cache_layout": "nhd",
        "dtype": torch.float8_e4m3fn,
        "quant_method": UnquantizedKVCacheMethod(),
    }
    return attention_inputs.is_plain(made(kind, **values | changes))


def choices() -> None:
    """What is taken, and what is left to SGLang."""
    print(fits(), is_plain())
    print(
        fits(rotary=MRotaryEmbedding),
        fits(head_dim=96),
        fits(scale=0.5),
        fits(use_fallback_kernel=True),
        fits(is_neox_style=False),
        fits(rotary_dim=64),
        fits(cos_sin_cache=torch.zeros(4, 128).bfloat16()),
        fits(weight=torch.ones(128)),
        fits(variance_epsilon=1e-6),
    )
    print(
        is_plain(PageMajorMHATokenToKVPool),
        is_plain(kv_cache_layout="hnd"),
        is_plain(dtype=torch.float8_e5m2),
        is_plain(quant_method=None),
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    for shape in ((6, 2, 64), (8, 8, 128), (3, 1, 256)):
        for dtype in (torch.float32, torch.float8_e4m3fn):
            kernel(*shape, dtype)
    plain = attention_inputs.is_plain
    forward()
    attention_inputs.is_plain = plain
    choices()
