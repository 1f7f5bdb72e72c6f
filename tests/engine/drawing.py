"""Tokens that a GPU's kernel draws; prints what `test_verification` compares."""

from __future__ import annotations

import torch

from kit.engine.gpu import drawing

drawing.BLOCK, drawing.COLUMNS = 16, 128  # so that a row has several parts


def main() -> None:
    """Compare with torch."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(6, 150)
    temperatures = torch.tensor([[0.7], [1.5]])
    tokens, log_probs = drawing.draw(logits, None, 3)
    plain = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    print(
        "greedy", bool((tokens == logits.argmax(-1)).all()), float((log_probs - plain).abs().max())
    )
    tokens, log_probs = drawing.draw(logits.bfloat16(), temperatures, 3)
    warm = logits.bfloat16().float() / temperatures.repeat_interleave(3, 0)
    warm = warm.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    print("warm", float((log_probs - warm).abs().max()))
    row = torch.tensor([2.0, 1.0, 0.0, float("-inf"), -1.0, 1.5] + [-2.0] * 60 + [2.2])
    draws = 300
    drawn, _ = drawing.draw(row.expand(draws, -1), torch.full((draws, 1), 1.3), 1)
    chances = (row / 1.3).softmax(-1)
    counts = drawn.bincount(minlength=len(row)).double()
    cells = [0, 1, 2, 4, 5, len(row) - 1]
    rest = list(range(6, len(row) - 1))
    seen = torch.cat([counts[cells], counts[rest].sum()[None]])
    expected = draws * torch.cat([chances[cells], chances[rest].sum()[None]])
    print("drawn", float(((seen - expected) ** 2 / expected).sum()), int(counts[3]))
    broken = logits.clone()
    broken[2, 7] = float("nan")
    tokens, log_probs = drawing.draw(broken, temperatures, 3)
    others = log_probs[[0, 1, 3, 4, 5]]
    print("broken", bool(log_probs[2].isnan()), bool(others.isfinite().all()), int(tokens.max()))


if __name__ == "__main__":
    main()
