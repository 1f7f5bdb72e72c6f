"""Samples of different lengths in one long row, without padding and without repeated prompts.

The samples of a group begin with the same prompt. What the model computes for a prompt depends on
nothing after it, so it is computed once, and every sample of the group attends to it. Only the
last token of a prompt is repeated: each sample predicts its own first token from it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Packed:
    """Some samples in one row of T tokens: shared beginnings first, then each sample's own tokens.

    S sequences attend in it (a shared beginning is one, and so is each of the N samples), and R
    response tokens are predicted.
    """

    tokens_T: torch.Tensor
    position_T: torch.Tensor
    """Place of each token in its own sample."""
    own_lengths: tuple[int, ...]
    """Tokens of each sequence in the row, (S); they sum to T."""
    seen_lengths: tuple[int, ...]
    """Tokens that each sequence's last token attends to: its beginning's, and its own, (S)."""
    seen_rows: torch.Tensor | None
    """Row of each of these, sequence after sequence; None where nothing is shared."""
    predictor_R: torch.Tensor
    """For each response token, the row of the token before it, whose output predicts it."""
    target_R: torch.Tensor
    """The response tokens."""
    sample_R: torch.Tensor
    """Which of these samples each response token belongs to."""

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        names = ("tokens_T", "position_T", "seen_rows", "predictor_R", "target_R", "sample_R")
        tensors = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{
                name: x.to(device, non_blocking=True)
                for name, x in tensors.items()
                if x is not None
            },
        )


def pack(
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    share_prompts: bool = True,
) -> Packed:
    """Lay samples out in one row.

    Args:
        tokens: prompt and response of each sample.
        response_lengths: how many of them are the response.
        share_prompts: compute equal prompts once; the results differ by rounding only.

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
    beginnings = [tuple(row[: _shareable(row, r)]) for row, r in _pairs(tokens, response_lengths)]
    times = Counter(beginnings if share_prompts else ())
    first_row: dict[tuple[int, ...], int] = {}
    """Where each shared beginning lies in the row."""
    flat: list[int] = []
    for beginning, count in times.items():
        if beginning and count > 1:
            first_row[beginning] = len(flat)
            flat += beginning
    own_lengths, seen_lengths = ([len(beginning) for beginning in first_row] for _ in range(2))
    position = [place for length in own_lengths for place in range(length)]
    seen = list(range(len(flat)))
    predictor: list[int] = []
    for row, response, beginning in zip(tokens, response_lengths, beginnings, strict=True):
        begin = first_row.get(beginning)
        skipped = 0 if begin is None else len(beginning)
        if begin is not None:
            seen += range(begin, begin + skipped)
        end = len(flat) + len(row) - skipped
        seen += range(len(flat), end)
        flat += row[skipped:]
        position += range(skipped, len(row))
        own_lengths.append(len(row) - skipped)
        seen_lengths.append(len(row))
        predictor += range(end - response - 1, end - 1)
    tokens_T, predictor_R = torch.tensor(flat), torch.tensor(predictor, dtype=torch.long)
    return Packed(
        tokens_T,
        torch.tensor(position),
        tuple(own_lengths),
        tuple(seen_lengths),
        torch.tensor(seen) if first_row else None,
        predictor_R,
        tokens_T[predictor_R + 1],
        torch.repeat_interleave(torch.arange(len(tokens)), torch.tensor(list(response_lengths))),
    )


def _pairs(
    tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]
) -> zip[tuple[Sequence[int], int]]:
    return zip(tokens, response_lengths, strict=True)


def _shareable(row: Sequence[int], response_length: int) -> int:
    """Tokens of a sample that its group may share: the prompt without its last token."""
    return len(row) - response_length - 1


def micro_batches(
    tokens: Sequence[Sequence[int]], response_lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Which samples to pack together: indices, each in one list.

    Samples of one prompt stay together where they fit. No list has more than `max_tokens` tokens,
    a shared prompt counted once, save for a single sample that is longer.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for index, (row, response) in enumerate(_pairs(tokens, response_lengths)):
        by_prompt.setdefault(tuple(row[: _shareable(row, response)]), []).append(index)
    units: list[tuple[int, list[int]]] = []
    for beginning, members in by_prompt.items():
        shared = len(beginning)
        own = [len(tokens[i]) - shared for i in members]
        for part in fit(own, max(1, max_tokens - shared)):
            units.append((shared + sum(own[i] for i in part), [members[i] for i in part]))
    return [
        sorted(index for unit in together for index in units[unit][1])
        for together in fit([size for size, _ in units], max_tokens)
    ]


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
