"""Tokens that a GPU's kernel draws; prints what `test_drawing` compares."""

from __future__ import annotations

import math
import sys

import torch

from kit.engine.gpu import drawing

drawing.BLOCK, drawing.COLUMNS = 16, 128  # so that a row has several parts
WORD = 0xFFFFFFFF


def philox(key: int, first: int, second: int) -> list[int]:
    """Philox-4x32-7 of the counter (first, second, 0, 0)."""
    c, k = [first, second, 0, 0], [key & WORD, key >> 32 & WORD]
    for _ in range(7):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & WORD, a >> 32 ^ c[3] ^ k[1], a & WORD]
        k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
    return c


def expected_token(row: torch.Tensor, temperature: float, seed: int, position: int) -> int:
    """The token whose exponential clock is the first to ring, in double precision."""
    best, token = -math.inf, -1
    for column, logit in enumerate(row.tolist()):
        block, lane = divmod(column, 4 * drawing.BLOCK)
        quarter, lane = divmod(lane, drawing.BLOCK)
        bits = philox(seed, block * drawing.BLOCK + lane, position)[quarter]
        signed = bits - (1 << 32) if bits >> 31 else bits
        share = max((-signed - 1 if signed < 0 else signed) * 4.6566127342e-10, 2.0**-32)
        score = logit / temperature - math.log(-math.log1p(-share))
        if score > best:
            best, token = score, column
    return token


def main() -> None:
    """Compare with torch, and with the formula."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 150)
    temperatures, seeds = torch.tensor([[0.7], [1.5]]), torch.tensor([-5, 2**40 + 3])
    positions = torch.tensor([7, 8, 9, 0, 1, 100_000])
    tokens, log_probs = drawing.draw(logits, None, seeds, positions, 3)
    plain = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    print(
        "greedy", bool((tokens == logits.argmax(-1)).all()), float((log_probs - plain).abs().max())
    )
    tokens, log_probs = drawing.draw(logits.bfloat16(), temperatures, seeds, positions, 3)
    warm = logits.bfloat16().float() / temperatures.repeat_interleave(3, 0)
    warm = warm.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    print("warm", float((log_probs - warm).abs().max()))
    tokens, _ = drawing.draw(logits, temperatures, seeds, positions, 3)
    expected = [
        expected_token(
            logits[i], float(temperatures[i // 3]), int(seeds[i // 3]), int(positions[i])
        )
        for i in range(6)
    ]
    print("formula", tokens.tolist() == expected, len(set(expected)))
    alone = [
        int(drawing.draw(logits[i : i + 1], *(x[i // 3 :] for x in (temperatures, seeds)), at)[0])
        for i, at in enumerate(positions.split(1))
    ]
    print("alone", tokens.tolist() == alone)
    broken = logits.clone()
    broken[2, 7] = float("nan")
    tokens, log_probs = drawing.draw(broken, temperatures, seeds, positions, 3)
    others = log_probs[[0, 1, 3, 4, 5]]
    print("broken", bool(log_probs[2].isnan()), bool(others.isfinite().all()), int(tokens.max()))


def draws() -> None:
    """How far from their probabilities tokens are drawn, and how often one that cannot be."""
    row = torch.tensor([2.0, 1.0, 0.0, float("-inf"), -1.0, 1.5] + [-2.0] * 60 + [2.2])
    size = 300
    by_place = torch.full((size, 1), 1.3), torch.arange(size) // 10, torch.arange(size) % 10
    drawn, _ = drawing.draw(row.expand(size, -1), *by_place)
    chances = (row / 1.3).softmax(-1)
    counts = drawn.bincount(minlength=len(row)).double()
    cells = [0, 1, 2, 4, 5, len(row) - 1]
    rest = list(range(6, len(row) - 1))
    seen = torch.cat([counts[cells], counts[rest].sum()[None]])
    often = size * torch.cat([chances[cells], chances[rest].sum()[None]])
    print("drawn", float(((seen - often) ** 2 / often).sum()), int(counts[3]))


if __name__ == "__main__":
    draws() if "draws" in sys.argv else main()
