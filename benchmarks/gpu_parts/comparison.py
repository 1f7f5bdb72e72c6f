"""Responses of an engine that drafts beside those of one that does not, and rows about both."""

from __future__ import annotations

import math
import statistics
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


def shown(name: str, found: Any) -> str:
    """A row of what was found, as lines."""
    kind = name.split("/")[0]
    if kind == "made":
        return "\n".join(f"{name}: {_made(known)}" for name, known in found.items())
    if kind in ("decoded", "rollout"):
        return "\n".join(f"{name}, {way}: {line}" for way, line in _decoded(found).items())
    if kind == "syncs":
        middle = {way: statistics.median(all) for way, all in found.items() if all}
        return "\n".join(
            f"syncs, {way}: median {middle[way] * 1000:.1f} ms, "
            f"{middle[way] / middle.get('plain', math.nan):.2f} x; "
            f"{', '.join(f'{s * 1000:.1f}' for s in found[way])}"
            for way in middle
        )
    if kind == "learned" and found:
        names = ("rollout/spec_accept_rate", "train/draft_loss")
        return "\n".join(f"steps: {n} {', '.join(f'{s[n]:.3f}' for s in found)}" for n in names)
    if kind == "memory":
        return "\n".join(
            f"memory, {way}, {phase}: planned {planned / 2**30:.2f} GiB, "
            f"measured {measured / 2**30:.2f}"
            for way, phases in found.items()
            for phase, planned, measured, _ in phases
            if measured
        )
    return f"{name}: {found}"


def _decoded(found: dict[str, Any]) -> dict[str, str]:
    """How fast each way has written, beside plain decoding."""
    rates = {way: e.get("rate") or e["tokens"] / e["seconds"] for way, e in found.items()}
    lines = {}
    for way, each in found.items():
        line = f"{rates[way]:.0f} tokens/s, {rates[way] / rates.get('plain', math.nan):.2f} x"
        if way != "plain":
            line += f", {each['passes']:.2f} tokens a pass, {each['drafted']:.0%} drafted"
        if each.get("estimate"):
            line += f", estimated {each['estimate']:.2f} x"
        if right := each.get("right"):
            fewer = [1 + sum(right[: n + 1]) for n in range(len(right))]
            line += f"; with 1, 2, … drafted about {', '.join(f'{n:.2f}' for n in fewer)} a pass"
        lines[way] = line
    return lines


def _made(known: dict[str, Any]) -> str:
    """How a model was made."""
    if "loss" in known:
        return f"{known['loss']:.3f} nats a token, trained in {known['seconds']:.0f} s"
    first, last = known["steps"][0], known["steps"][-1]
    begin, end = (step.get("rollout/spec_accept_rate", 0.0) for step in (first, last))
    return (
        f"{begin:.0%} accepted in the first of {len(known['steps'])} rollouts, {end:.0%} in the "
        f"last, made in {known['seconds']:.0f} s"
    )
