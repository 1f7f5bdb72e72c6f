"""Samples of different lengths in one long row, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kit.errors import DataError


@dataclass(frozen=True, slots=True)
class Packed:
    """Some samples, one after the other. T tokens in all, N samples, R response tokens."""

    tokens_T: torch.Tensor
    position_T: torch.Tensor
    """Place of each token in its own sample."""
    lengths: tuple[int, ...]
    """Tokens of each sample."""
    predictor_R: torch.Tensor
    """For each response token, the row of the token before it, whose output predicts it."""
    target_R: torch.Tensor
    """The response tokens."""
    sample_R: torch.Tensor
    """Which of these samples each response token belongs to."""

    def to(self, device: torch.device) -> Packed:
        """The same on another device."""
        return Packed(
            self.tokens_T.to(device, non_blocking=True),
            self.position_T.to(device, non_blocking=True),
            self.lengths,
            self.predictor_R.to(device, non_blocking=True),
            self.target_R.to(device, non_blocking=True),
            self.sample_R.to(device, non_blocking=True),
        )


def pack(tokens: Sequence[Sequence[int]], response_lengths: Sequence[int]) -> Packed:
    """Lay samples out in one row.

    Raises:
        DataError: a sample has no token before its response, so nothing predicts its first one.
    """
    lengths = [len(row) for row in tokens]
    for place, (length, response) in enumerate(zip(lengths, response_lengths, strict=True)):
        if length <= response:
            raise DataError(
                f"Sample {place} of a micro-batch has {length} tokens, {response} of them its "
                f"response: no token comes before it.",
                fix="give every prompt at least one token.",
            )
    length_N = torch.tensor(lengths)
    response_N = torch.tensor(list(response_lengths))
    end_N = length_N.cumsum(0)
    tokens_T = torch.tensor([token for row in tokens for token in row])
    position_T = torch.arange(len(tokens_T)) - torch.repeat_interleave(end_N - length_N, length_N)
    sample_R = torch.repeat_interleave(torch.arange(len(lengths)), response_N)
    within_R = torch.arange(len(sample_R)) - (response_N.cumsum(0) - response_N)[sample_R]
    row_R = (end_N - response_N)[sample_R] + within_R
    return Packed(tokens_T, position_T, tuple(lengths), row_R - 1, tokens_T[row_R], sample_R)


def micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Which samples to pack together: indices, first fit in order of falling length.

    No micro-batch has more than `max_tokens` tokens, save for a single sample that is longer.
    """
    bins: list[tuple[int, list[int]]] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for place, (used, members) in enumerate(bins):
            if used + lengths[index] <= max_tokens:
                bins[place] = (used + lengths[index], [*members, index])
                break
        else:
            bins.append((lengths[index], [index]))
    return [sorted(members) for _, members in bins]
