"""Attention of drafted tokens by the kit's kernel, by SGLang's and written out.

Prints by how much the kernels differ and by how much the kit's and plain torch do, in several parts
and in one, with masks and without.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from kit.engine.gpu import draft_attention as attention
from kit.engine.gpu.speculative import whole_mask

LENS, NODES, HEADS, KV_HEADS, SIZE = [7, 70, 0], 5, 4, 2, 32


def main() -> None:
    """Compare."""
    torch.manual_seed(0)
    total, count = sum(LENS), len(LENS)
    keys, values = torch.randn(2, 200, KV_HEADS, SIZE)
    places = torch.randperm(200)[:total]
    query = torch.randn(count * NODES, HEADS, SIZE)
    new_keys, new_values = torch.randn(2, count * NODES, KV_HEADS, SIZE)
    lens = torch.tensor(LENS)
    own = torch.rand(count, NODES, NODES) < 0.5
    own |= torch.eye(NODES, dtype=torch.bool)
    mask = whole_mask(own, lens, total).to(torch.uint8)

    def up_to(sizes: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.zeros(1, dtype=sizes.dtype), sizes.cumsum(0)])

    layout = up_to(torch.full((count,), NODES)), up_to(lens).int(), places
    masks: tuple[Any, ...] = mask, True, up_to((lens + NODES) * NODES), NODES

    def attended(attend: Callable[..., Any]) -> torch.Tensor:
        out = torch.empty_like(query)
        attend(query, new_keys, new_values, out, keys, values, *layout, *masks, 1.0, 1.0)
        return out

    expected, first = torch.empty_like(query), 0
    for row, length in enumerate(LENS):
        before = places[first : first + length]
        here, first = slice(row * NODES, (row + 1) * NODES), first + length
        seen = torch.cat([torch.ones(NODES, length, dtype=torch.bool), own[row]], dim=1)
        for head in range(HEADS):
            of = head * KV_HEADS // HEADS
            k = torch.cat([keys[before, of], new_keys[here, of]])
            v = torch.cat([values[before, of], new_values[here, of]])
            scores = (query[here, head] @ k.T * SIZE**-0.5).masked_fill(~seen, -torch.inf)
            expected[here, head] = scores.softmax(-1) @ v
    kernels = import_module("sglang.kernels.ops.attention.extend_attention")
    theirs = kernels.extend_attention_fwd
    attention.stands_in(kernels)
    for programs in (1024, 1):
        attention.PROGRAMS = programs
        ours = attended(kernels.extend_attention_fwd)
        print(float((attended(theirs) - ours).abs().max()), float((ours - expected).abs().max()))
    masks = None, True, None, NODES
    print(float((attended(theirs) - attended(kernels.extend_attention_fwd)).abs().max()))


if __name__ == "__main__":
    main()
