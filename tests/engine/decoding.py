"""Attention of decoding by the kit's kernel and written out; prints by how much they differ.

And how many requests were split; and whether the kernel quantises as the operator for it does.
"""

from __future__ import annotations

import torch

from kit.engine.gpu import decode_attention as attention
from kit.operators import fp8_cuda

LENS, HEADS, KV_HEADS, SIZE = [7, 70, 1, 33], 6, 2, 32


def main() -> None:
    """Compare: whole requests, and split."""
    attention.TILE = 16 * SIZE  # so that a request has several tiles
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


def quantised() -> None:
    """Compare the codes and scales of answers with those of `quantize_rows`."""
    attention.TILE, attention.PROGRAMS = 16 * 128, 1
    keys, values = torch.randn(2, 200, KV_HEADS, 128)
    places = torch.randperm(200)[: sum(LENS)]
    begins = torch.tensor([0, *LENS]).cumsum(0).int()
    query, rows = torch.randn(len(LENS), HEADS, 128), len(LENS)
    room = torch.zeros(rows, HEADS, 1, 128), torch.zeros(rows, HEADS, 1)
    plain, unwritten = torch.zeros_like(query), torch.zeros_like(query)
    codes = fp8_cuda.room_for_codes(query, rows, HEADS * 128)
    given = query, keys, values
    attention.attend(*given, plain, begins, places, *room, 0.3)
    attention.attend(*given, unwritten, begins, places, *room, 0.3, codes=codes)
    wanted, scales = fp8_cuda.quantize_rows(plain.flatten(1))
    print(
        torch.equal(codes[0][:rows].float(), wanted.float()),
        torch.equal(codes[1][:, :rows].T, scales),
        not unwritten.any(),
    )


if __name__ == "__main__":
    main()
    quantised()
