"""Division of an update's batch into optimizer steps, ranks and micro-batches."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from kit.config import TrainingConfig
from kit.messages import TrainBatch
from kit.models.packing import micro_batches, prompts_in_common

MAX_TOKENS = 16384
"""Tokens a micro-batch where nobody has planned."""
SHARED_FROM = 0.25
"""Share of tokens saved from which a GPU computes each prompt once."""


def flat(rows: Sequence[Sequence[float]], indices: Sequence[int]) -> torch.Tensor:
    """The values of these samples, one after the other, float32."""
    return torch.tensor([x for i in indices for x in rows[i]], dtype=torch.float32)


def optimizer_steps(count: int, training: TrainingConfig, seed: str) -> list[list[int]]:
    """Samples of each optimizer step of an update; epochs after the first are reshuffled."""
    size = training.global_batch_size or count
    steps = []
    draw = random.Random(seed)
    for epoch in range(training.epochs_per_rollout):
        order = list(range(count))
        if epoch:
            draw.shuffle(order)
        steps += [sorted(order[i : i + size]) for i in range(0, count, size)]
    return steps


def worth_sharing(
    tokens: Sequence[Sequence[int]], response_lengths: Sequence[int], device: torch.device
) -> bool:
    """Whether prompts are long enough to be computed once for all their samples.

    On a GPU attention then has to gather what it sees, which takes as long as a fifth of the work.
    """
    if device.type != "cuda":
        return True
    return prompts_in_common(tokens, response_lengths) > SHARED_FROM


def rank_share(
    batch: TrainBatch, part: Sequence[int], world: int, limit: int, rank: int, *, share: bool = True
) -> list[list[int]]:
    """Micro-batches of one rank; empty ones if another rank has more.

    FSDP ranks run in step: each must call the model as often as the others.
    """
    by_rank = []
    for other in range(world):
        # Neighbours, so that the samples of a prompt mostly stay with one rank.
        own = part[other * len(part) // world : (other + 1) * len(part) // world]
        bins = micro_batches(
            [batch.tokens[i] for i in own],
            [batch.response_lengths[i] for i in own],
            limit,
            share=share,
        )
        by_rank.append([[own[i] for i in members] for members in bins])
    most = max(len(bins) for bins in by_rank)
    return by_rank[rank] + [[]] * (most - len(by_rank[rank]))


def flat_advantages(batch: TrainBatch, indices: Sequence[int]) -> torch.Tensor:
    """Advantages of these samples by response token, (R)."""
    if batch.token_advantages is not None:
        return flat(batch.token_advantages, indices)
    lengths = torch.tensor([batch.response_lengths[i] for i in indices])
    advantage_N = torch.tensor([batch.advantages[i] for i in indices], dtype=torch.float32)
    return torch.repeat_interleave(advantage_N, lengths)
