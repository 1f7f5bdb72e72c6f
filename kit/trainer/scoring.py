"""`LogProbScorer`: what a trainer's networks make of samples; nothing is changed by it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch

from kit.errors import StackError
from kit.models.moe import Recorded
from kit.models.packing import Packed, micro_batches, pack
from kit.trainer.backend import TrainerBackend
from kit.trainer.batch import worth_sharing
from kit.trainer.learner import CRITIC, POLICY
from kit.trainer.offload import out_of_memory
from kit.trainer.process_group import NEVER, CancelToken
from kit.trainer.settings import TrainerSettings

if TYPE_CHECKING:
    from kit.messages import ExpertRecords

Rows = list[list[float]]
"""A number for each response token, sample by sample."""

Parts = Iterable[tuple[list[int], Packed]]
"""Samples in micro-batches: (their indices, packed on the device)."""


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Log-prob and entropy of each response token in nats: one tensor a sample, on the device."""

    log_probs: list[torch.Tensor]
    entropies: list[torch.Tensor]


@dataclass(frozen=True, slots=True)
class LogProbScorer:
    """Log-probs, entropies and values of every response token; all ranks compute all samples."""

    backend: TrainerBackend
    settings: TrainerSettings

    def score(
        self,
        tokens: Sequence[Sequence[int]],
        response_lengths: Sequence[int],
        models: Sequence[str] = (POLICY,),
        *,
        parts: Parts | None = None,
        experts: ExpertRecords = None,
        temperature: float | None = None,
        dropout: bool = False,
        gradient: bool = False,
        cancel: CancelToken = NEVER,
    ) -> list[TokenScores]:
        """Score all samples with each of these models.

        Args:
            tokens: the samples.
            response_lengths: how many tokens at the end of each are its response.
            models: `policy` and `reference`, or one of them.
            parts: how the samples are packed; None takes the largest micro-batches.
            experts: records of the samples that the policy follows, where there are no parts.
            temperature: divides the logits; None takes that of sampling.
            dropout: in training mode, as in an update.
            gradient: with the operations of an update's forward pass.
            cancel: stops between two micro-batches.

        Raises:
            StackError: the device had too little memory.
            StoppedError: `cancel` asked for it.
        """
        if temperature is None:
            temperature = self.settings.temperature
        if parts is None:
            limit = self.settings.max_tokens_forward
            parts = self.parts(tokens, response_lengths, limit, experts=experts)
        empty = [torch.empty(0)] * len(tokens)
        scores = [TokenScores(empty.copy(), empty.copy()) for _ in models]
        with out_of_memory(self.settings.max_tokens, self.backend.recover):
            for members, packed in parts:
                cancel.check()
                lengths = [response_lengths[i] for i in members]
                for name, score in zip(models, scores, strict=True):
                    output = self.backend.log_probs(
                        packed, temperature, name, dropout=dropout, gradient=gradient
                    )
                    logp, entropy = (x.split(lengths) for x in output)
                    for place, index in enumerate(members):
                        score.log_probs[index] = logp[place]
                        score.entropies[index] = entropy[place]
        return scores

    def log_probs(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        of: str = POLICY,
        experts: ExpertRecords = None,
    ) -> Rows:
        """Log-probability of each response token under the present weights, or the reference's."""
        if not self.backend.has(of):
            raise StackError(
                "There is no reference model.",
                fix="set training.kl_loss_coef or training.kl_coef above 0.",
            )
        scores = self.score(tokens, response_lengths, [of], experts=experts)
        return as_rows(scores[0].log_probs)

    def values(self, tokens: list[list[int]], response_lengths: list[int]) -> Rows:
        """Critic's value before each response token."""
        if not self.backend.has(CRITIC):
            raise StackError(
                "There is no critic.", fix="set training.advantage_estimator: ppo to have one."
            )
        rows = [torch.empty(0)] * len(tokens)
        for members, packed in self.parts(tokens, response_lengths):
            parts = self.backend.values(packed).split([response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                rows[index] = part
        return as_rows(rows)

    def parts(
        self,
        tokens: Sequence[Sequence[int]],
        response_lengths: Sequence[int],
        limit: int | None = None,
        *,
        experts: ExpertRecords = None,
        followed: bool = True,
    ) -> Iterator[tuple[list[int], Packed]]:
        """All samples in micro-batches of at most `limit` tokens; None takes those of an update."""
        limit, device = limit or self.settings.max_tokens, self.backend.device
        share = worth_sharing(tokens, response_lengths, device)
        for members in micro_batches(tokens, response_lengths, limit, share=share):
            rows, lengths = [tokens[i] for i in members], [response_lengths[i] for i in members]
            recorded = self.recorded(experts, members, followed=followed)
            yield members, pack(rows, lengths, share=share, experts=recorded).to(device)

    def recorded(
        self, experts: ExpertRecords, members: Sequence[int], *, followed: bool = True
    ) -> Recorded | None:
        """What is recorded of some samples, in the form in which they are packed."""
        if experts is None or not self.backend.experts[0]:
            return None
        records = [experts[i] for i in members]
        return Recorded(records, *self.backend.experts, followed=followed)

    def one_by_one(
        self,
        tokens: Sequence[Sequence[int]],
        response_lengths: Sequence[int],
        experts: ExpertRecords = None,
    ) -> Iterator[tuple[list[int], Packed]]:
        """Each sample by itself, in the form of `parts`."""
        for index, (row, length) in enumerate(zip(tokens, response_lengths, strict=True)):
            recorded = self.recorded(experts, [index])
            packed = pack([row], [length], share=False, experts=recorded)
            yield [index], packed.to(self.backend.device)


def as_rows(values: Sequence[torch.Tensor]) -> Rows:
    """Each tensor as a list; brought to the host at once, since each would wait for the device."""
    if not values:
        return []
    flat = torch.cat(list(values)).tolist()
    ends = [0, *accumulate(map(len, values))]
    return [flat[a:b] for a, b in pairwise(ends)]
