"""Queries, keys and values made ready by one kernel: interpreted, and on a GPU as SGLang's are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.engine.interpreted import interpreted

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_queries_keys_and_cache_are_what_is_written_out() -> None:
    lines = interpreted("inputs")
    for query, key, near, value, kept, elsewhere in lines[:6]:
        assert max(float(query), float(key)) < 1e-5
        assert float(near) > 0.9
        assert (float(value), float(kept), int(elsewhere)) == (0, 0, 0)
    for exact in lines[:6:2]:
        assert float(exact[2]) == 1
    *differences, unsaved = lines[6]
    assert max(map(float, differences)) < 1e-5
    assert unsaved == "True"
    assert lines[7:10] == [["SGLang's"]] * 3  # read, verified, and a cache of another kind
    assert lines[10:] == [["True", "True"], ["False"] * 9, ["False"] * 4]


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "shared", "size"),
    [(32, 8, 128), (16, 8, 128), (64, 8, 128), (14, 2, 64), (5, 1, 128), (8, 4, 256), (12, 12, 64)],
)
@pytest.mark.parametrize("tokens", [1, 7, 256, 1000])
def test_a_gpus_are_sglangs_to_the_bit(
    dtype: torch.dtype, heads: int, shared: int, size: int, tokens: int
) -> None:
    from sglang.jit_kernel.norm import fused_inplace_qknorm
    from sglang.jit_kernel.rope import apply_rope_with_cos_sin_cache_inplace

    from kit.engine.gpu.attention_inputs import make_ready

    torch.manual_seed(tokens)
    cuda: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    qkv = 4 * torch.randn(tokens, (heads + 2 * shared) * size, **cuda)
    qkv[-1, -1], qkv[0, -3:-1] = float("nan"), torch.tensor([466.0, -464.0], **cuda)
    positions = torch.randint(0, 40_000, (tokens,), device="cuda")
    places = torch.randperm(tokens + 90, device="cuda")[:tokens]
    angles = torch.arange(40_960, device="cuda")[:, None] / 1e6 ** (
        torch.arange(0, size, 2, device="cuda") / size
    )
    table = torch.cat([angles.cos(), angles.sin()], 1)
    weights = tuple(1 + torch.randn(size, **cuda) for _ in range(2))
    keys, values = (torch.zeros(tokens + 90, shared, size, **cuda).to(dtype) for _ in range(2))
    q, k, v = (
        part.unflatten(1, (-1, size))
        for part in qkv.clone().split([heads * size, shared * size, shared * size], 1)
    )
    fused_inplace_qknorm(q, k, *weights, 1e-6, head_dim=size)
    apply_rope_with_cos_sin_cache_inplace(
        positions=positions, q=q, k=k, cos_sin_cache=table, is_neox=True
    )
    make_ready(qkv, positions, places, table, weights, 1e-6, keys, values)
    own = qkv.unflatten(1, (-1, size)).split([heads, shared, shared], 1)
    assert [int((a != b).sum()) for a, b in zip(own[:2], (q, k), strict=True)] == [0, 0]
    for cached, given in ((keys, k), (values, v)):
        assert torch.equal(bits(cached[places]), bits(given.to(dtype)))
        assert int((cached.float() != 0).any(-1).any(-1).sum()) == tokens


def bits(numbers: torch.Tensor) -> torch.Tensor:
    """The bits of numbers, but of NaN whichever."""
    wide = numbers.float()
    return torch.where(wide.isnan(), torch.inf, wide)


@on_a_gpu
def test_a_gpu_converts_to_e4m3_as_torch_does() -> None:
    from kit.engine.gpu.attention_inputs import make_ready

    every = torch.arange(1 << 16, device="cuda").to(torch.int16).view(torch.bfloat16).view(512, 128)
    qkv = torch.zeros(512, 3 * 128, device="cuda", dtype=torch.bfloat16)
    qkv[:, 256:] = every
    keys, values = (
        torch.zeros(512, 1, 128, device="cuda", dtype=torch.float8_e4m3fn) for _ in range(2)
    )
    one = torch.ones(128, device="cuda", dtype=torch.bfloat16)
    place = torch.arange(512, device="cuda")
    table = torch.zeros(512, 128, device="cuda")
    make_ready(qkv, place, place, table, (one, one), 1e-6, keys, values)
    assert torch.equal(bits(values[:, 0]), bits(every.to(torch.float8_e4m3fn)))
