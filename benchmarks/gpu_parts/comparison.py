"""Responses of an engine that drafts beside those of one that does not."""

from __future__ import annotations

import math
from typing import Any


def differences(plain: dict[str, Any], drafts: dict[str, Any]) -> dict[str, Any]:
    """How many greedy responses are the same, and how close the rest were where they parted.

    Two tokens that one engine or the other takes in the same place have nearly the same log-prob
    where rounding decided; passes of one token and of several round differently.
    """
    same, gaps = 0, []
    pairs = zip(plain["tokens"], drafts["tokens"], strict=True)
    for row, (ours, theirs) in enumerate(pairs):
        parted = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b]
        if not parted:
            same += ours == theirs
            continue
        place = parted[0]
        gap = plain["log_probs"][row][place] - drafts["log_probs"][row][place]
        gaps.append([place, abs(gap)])
    written = sum(map(len, plain["tokens"]))
    return {"same": same, "of": len(plain["tokens"]), "tokens": written, "gaps": gaps}


def alike(plain: list[list[int]], drafts: list[list[int]]) -> dict[int, int]:
    """How many responses begin alike, by how many tokens of them are compared."""
    lengths = (16, 64, 256)
    return {n: sum(a[:n] == b[:n] for a, b in zip(plain, drafts, strict=True)) for n in lengths}


def chi_square(plain: list[list[Any]], drafts: list[list[Any]]) -> dict[str, Any]:
    """Draws with drafts against the probabilities that plain decoding says.

    What is expected fewer than five times is one cell.
    """
    import torch

    draws = sum(count for _, count, _ in drafts)
    counts = {tuple(first): count for first, count, _ in drafts}
    cells, rest, left = [], draws, float(draws)
    for first, _, log_prob in plain:
        expected = draws * math.exp(log_prob)
        if expected >= 5:
            seen = counts.get(tuple(first), 0)
            cells.append((seen, expected))
            rest, left = rest - seen, left - expected
    if left >= 5:
        cells.append((rest, left))
    total = sum((seen - expected) ** 2 / expected for seen, expected in cells)
    half = torch.tensor([(len(cells) - 1) / 2, total / 2], dtype=torch.float64)
    chance = float(torch.special.gammaincc(half[0], half[1])) if len(cells) > 1 else None
    return {"cells": len(cells), "chi_square": total, "p": chance, "rest": rest, "expected": left}
