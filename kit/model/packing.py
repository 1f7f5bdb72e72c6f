"""Samples of different lengths in one long row, without padding and without repetition.

What the model computes for a token depends on it and on the tokens before it. Samples that begin
alike (all samples of a group have the prompt in common, and often more) therefore share rows: a
beginning is computed once, and every sample that has it attends to it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Packed:
    """Some samples in one row of T tokens.

    A sequence is a stretch of the row in which each token follows the one before: the prompt of a
    group, or what a sample adds to what is there already. There are S of them; R response tokens
    are predicted.
    """

    tokens_T: torch.Tensor
    position_T: torch.Tensor
    """Place of each token in the samples that it belongs to."""
    own_lengths: tuple[int, ...]
    """Tokens of each sequence in the row, (S); they sum to T."""
    seen_lengths: tuple[int, ...]
    """Tokens that each sequence's last token attends to, itself and those before it, (S)."""
    seen_rows: torch.Tensor | None
    """Row of each of these, sequence after sequence; None where no two sequences share a row."""
    predictor_R: torch.Tensor
    """For each response token, the row of the token before it, whose output predicts it. Samples
    with this beginning in common have it in common."""
    target_R: torch.Tensor
    """The response tokens."""
    sample_R: torch.Tensor
    """Which of these samples each response token belongs to."""

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        names = ("tokens_T", "position_T", "seen_rows", "predictor_R", "target_R", "sample_R")
        tensors = {name: getattr(self, name) for name in names}
        moved: dict[str, Any] = {
            name: to_device(x, device) for name, x in tensors.items() if x is not None
        }
        return replace(self, **moved)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same on a device, without waiting for what the device is doing."""
    if device.type != "cuda":
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def pack(
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    share: bool = True,
) -> Packed:
    """Lay samples out in one row.

    Args:
        tokens: prompt and response of each sample.
        response_lengths: how many of them are the response.
        share: compute equal beginnings once; the results differ by rounding only.

    Raises:
        DataError: a sample has no token before its response, so nothing predicts its first one.
    """
    for place, (row, response) in enumerate(zip(tokens, response_lengths, strict=True)):
        if len(row) <= response:
            raise DataError(
                f"Sample {place} of a micro-batch has {len(row)} tokens, {response} of them its "
                f"response: no token comes before it.",
                fix="give every prompt at least one token.",
            )
    row_of: dict[tuple[int, int], int] = {}
    """Row of a token, by the row of the token before it."""
    flat: list[int] = []
    position: list[int] = []
    own_lengths: list[int] = []
    seen_lengths: list[int] = []
    seen: list[int] = []
    predictor: list[int] = []

    def lay(tokens: Sequence[int]) -> list[int]:
        """The row of each token; what is not in the row yet is put at its end, as a sequence."""
        before, rows, row = len(flat), [], -1
        for place, token in enumerate(tokens):
            known = row_of.get((row, token)) if share else None
            if known is None:
                known = row_of[row, token] = len(flat)
                flat.append(token)
                position.append(place)
            row = known
            rows.append(row)
        if len(flat) > before:
            own_lengths.append(len(flat) - before)
            seen_lengths.append(len(rows))
            seen.extend(rows)
        return rows

    times = Counter(tuple(row[: len(row) - r]) for row, r in _pairs(tokens, response_lengths))
    for prompt, count in times.items():
        if share and count > 1:
            lay(prompt)  # by itself, so that no sample of the group is longer than the others
    for row, response in _pairs(tokens, response_lengths):
        rows = lay(row)
        predictor += rows[len(rows) - response - 1 : len(rows) - 1]
    targets = [t for row, r in _pairs(tokens, response_lengths) for t in row[len(row) - r :]]
    return Packed(
        torch.tensor(flat),
        torch.tensor(position),
        tuple(own_lengths),
        tuple(seen_lengths),
        torch.tensor(seen) if len(seen) > len(flat) else None,
        torch.tensor(predictor, dtype=torch.long),
        torch.tensor(targets, dtype=torch.long),
        torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(list(response_lengths))),
    )


def _pairs(
    tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]
) -> zip[tuple[Sequence[int], int]]:
    return zip(tokens, response_lengths, strict=True)


def micro_batches(
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    max_tokens: int,
    *,
    share: bool = True,
) -> list[list[int]]:
    """Which samples to pack together: indices, each in one list.

    Samples of one prompt stay together where they fit. No list takes more than `max_tokens` rows,
    save for a single sample that is longer.

    Args:
        tokens: prompt and response of each sample.
        response_lengths: how many of them are the response.
        max_tokens: rows.
        share: will equal prompts be computed once?
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, (row, response) in enumerate(_pairs(tokens, response_lengths)):
        by_prompt.setdefault(tuple(row[: len(row) - response]), []).append(index)
    units: list[tuple[int, list[int]]] = []
    for prompt, members in by_prompt.items():
        shared = len(prompt) if share else 0
        own = [max(1, len(tokens[i]) - shared) for i in members]
        for part in fit(own, max(1, max_tokens - shared)):
            units.append((shared + sum(own[i] for i in part), [members[i] for i in part]))
    return [
        sorted(index for unit in together for index in units[unit][1])
        for together in fit([size for size, _ in units], max_tokens)
    ]


def prompts_in_common(tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> float:
    """Share of all tokens that are saved where each prompt is computed once."""
    prompts = [tuple(row[: len(row) - r]) for row, r in _pairs(tokens, response_lengths)]
    saved = sum(map(len, prompts)) - sum(map(len, set(prompts)))
    return saved / max(sum(map(len, tokens)), 1)


def fit(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Bins of indices: first fit in order of falling size. A size over the limit is alone."""
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for place, (used, members) in enumerate(bins):
            if used + sizes[index] <= limit:
                bins[place] = (used + sizes[index], [*members, index])
                break
        else:
            bins.append((sizes[index], [index]))
    return [sorted(members) for _, members in bins]
