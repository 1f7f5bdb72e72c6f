"""Attention of decoding on a GPU: in Triton's interpreter, and where there is one, on it."""

from __future__ import annotations

from functools import wraps

import pytest
import torch

from kit.engine.gpu.decode_attention import columns_of, fits, parts_of, stages_of
from tests.engine.interpreted import interpreted

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_it_is_what_is_written_out_whole_and_in_parts() -> None:
    whole, narrow, *divided = interpreted("decoding")
    assert [line[0] for line in (whole, narrow, *divided)] == ["0", "0", "2", "2"]
    for line in (whole, *divided[::2]):
        assert max(map(float, line[1:])) < 1e-5
    for line in (narrow, *divided[1::2]):  # weights of 11 bits
        assert max(map(float, line[1:])) < 2e-3


def test_requests_are_divided_where_they_are_few() -> None:
    parts = {programs: parts_of(programs, 8) for programs in (1, 8, 128, 256, 511, 512, 2048)}
    assert parts == {1: 8, 8: 8, 128: 8, 256: 4, 511: 2, 512: 1, 2048: 1}


def test_as_many_tiles_are_under_way_as_a_card_has_room_for() -> None:
    h200, l4 = 232_448, 101_376
    assert [columns_of(size, 2) for size in (128, 64, 256, 16)] == [64, 128, 32, 128]
    assert [columns_of(size, 1) for size in (128, 64, 256, 16)] == [32, 64, 16, 128]
    assert (stages_of(128, 2, h200), stages_of(128, 2, l4), stages_of(128, 2, 65_536)) == (3, 2, 0)
    assert (stages_of(128, 1, l4), stages_of(64, 2, l4)) == (5, 2)


def test_only_heads_that_were_compared_are_taken() -> None:
    def tensors(size: int = 128, heads: int = 16, dtype: torch.dtype = torch.bfloat16) -> list:
        query, out = torch.zeros(2, 3, heads, size, dtype=torch.bfloat16)
        return [query, *torch.zeros(2, 9, 8, size, dtype=dtype), out]

    assert fits(*tensors())
    assert fits(*tensors(dtype=torch.float8_e4m3fn))
    assert not fits(*tensors(dtype=torch.float32))
    assert not fits(*tensors(size=80))
    assert not fits(*tensors(size=512))
    assert not fits(*tensors(heads=8 * 65))
    query, keys, values, out = tensors()
    assert not fits(query, keys, values[..., :64], out)
    assert not fits(query, keys, values, out.float())
    assert not fits(query, keys[:, None], values[:, None], out)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize(
    ("heads", "shared", "size"),
    [(16, 8, 128), (32, 8, 128), (14, 2, 64), (8, 8, 128), (8, 1, 256), (64, 1, 128), (4, 2, 16)],
)
@pytest.mark.parametrize(("count", "longest"), [(1, 3000), (8, 700), (200, 700), (200, 5000)])
def test_a_gpus_is_what_is_written_out(
    dtype: torch.dtype, heads: int, shared: int, size: int, count: int, longest: int
) -> None:
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    from kit.engine.gpu.decode_attention import standing_in

    torch.manual_seed(0)
    lens = torch.randint(1, 300, (count,), device="cuda")
    lens[count // 2] = longest
    total = int(lens.sum())
    begins = torch.cat([lens.new_zeros(1), lens.cumsum(0)]).int()
    places = torch.randperm(total + 50, device="cuda")[:total]
    cuda = {"device": "cuda", "dtype": torch.bfloat16}
    keys, values = torch.randn(2, total + 50, shared, size, **cuda).to(dtype)
    query = torch.randn(count, heads, size, **cuda)
    out = torch.full_like(query, torch.nan)
    room = [torch.empty(count, heads, 8, *last, device="cuda") for last in ((size,), ())]
    calls = []

    def theirs(*args: object, **kwargs: object) -> None:
        calls.append(args)

    attend = standing_in(wraps(decode_attention_fwd)(theirs))
    asked = query, keys, values, out, begins, places, *room, None, 8, size**-0.5, 1.0, 1.0
    attend(*asked)
    assert not calls
    for row in {0, count // 2, count - 1}:
        here = places[begins[row] : begins[row + 1]]
        k, v = (x[here].float().repeat_interleave(heads // shared, 1) for x in (keys, values))
        scores = torch.einsum("hd,shd->hs", query[row].float(), k) * size**-0.5
        expected = torch.einsum("hs,shd->hd", scores.softmax(-1), v)
        assert (out[row].float() - expected).abs().max() < 0.02 * (1 + expected.abs().max())
    attend(*asked, logit_cap=30.0)
    attend(*asked, sinks=torch.zeros(heads, device="cuda"))
    assert len(calls) == 2
