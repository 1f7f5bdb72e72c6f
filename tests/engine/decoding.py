"""Attention of decoding by the kit's kernel and written out; prints by how much they differ.

And how many requests were split.
"""

from __future__ import annotations

import torch

from kit.engine.gpu import decode_attention as attention

LENS, HEADS, KV_HEADS, SIZE = [7, 70, 1, 33], 6, 2, 32


def main() -> None:
    """Compare: whole requests, and split."""
    tile = 16 * SIZE, 2, 3  # so that a request has several
    attention.TILES = {1: tile, 4: tile}
    torch.manual_seed(0)
    total, count = sum(LENS), len(LENS)
    keys, values = torch.randn(2, 200, KV_HEADS, SIZE)
    places = torch.randperm(200)[:total]
    begins = torch.cat([torch.zeros(1, dtype=torch.int32), torch.tensor(LENS).cumsum(0).int()])
    query = torch.randn(count, HEADS, SIZE)
    for programs in (1, 1024):
        attention.PROGRAMS = programs
        for narrow in (False, True):
            k, v = (x.to(torch.float8_e4m3fn) if narrow else x for x in (keys, values))
            out = torch.full_like(query, torch.nan)
            partial = torch.full((count, HEADS, 4, SIZE), torch.nan)
            logs = torch.full((count + 2, HEADS, 4), 7.0)
            attention.attend(query, k, v, out, begins, places, partial, logs, 0.3)
            apart = (out - expected(query, k, v, places)).abs().amax((1, 2))
            split = (~partial.isnan()).flatten(1).any(1)
            print(int(split.sum()), *apart.tolist())


def expected(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: torch.Tensor
) -> torch.Tensor:
    """What the last tokens attend to, head by head."""
    out, first = torch.empty_like(query), 0
    for row, length in enumerate(LENS):
        here, first = places[first : first + length], first + length
        for head in range(HEADS):
            k, v = (x.float()[here, head * KV_HEADS // HEADS] for x in (keys, values))
            out[row, head] = (k @ query[row, head] * 0.3).softmax(0) @ v
    return out


if __name__ == "__main__":
    main()
