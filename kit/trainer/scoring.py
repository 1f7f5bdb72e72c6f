"""`Looks`: the part of a trainer that says what its models make of samples, and changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch

from kit.errors import StackError
from kit.messages import TrainBatch
from kit.models.packing import Packed
from kit.models.policy import Policy
from kit.trainer.batch import packed_parts
from kit.trainer.fsdp import without_gradient
from kit.trainer.learner import Critic
from kit.trainer.offload import out_of_memory
from kit.trainer.settings import TrainerSettings
from kit.trainer.step import StopSign

Of = Literal["policy", "reference"]


class Looks:
    """Log-probs and values of every response token; all ranks compute all samples."""

    settings: TrainerSettings
    device: torch.device
    policy: Policy
    reference: Policy | None
    critic: Critic | None
    stop_sign: StopSign

    def log_probs(
        self, tokens: list[list[int]], response_lengths: list[int], of: Of = "policy"
    ) -> list[list[float]]:
        """Log-probability of each response token under the present weights, or the reference's."""
        model = self.policy if of == "policy" else self.reference
        if model is None:
            raise StackError(
                "There is no reference model.",
                fix="set training.kl_loss_coef or training.kl_coef above 0.",
            )
        rows = self._all_log_probs(tokens, response_lengths, [model])[0]
        # Brought over at once: each of some hundred rows would wait for the device.
        values = torch.cat(rows).tolist()
        ends = [0, *accumulate(response_lengths)]
        return [values[a:b] for a, b in pairwise(ends)]

    def values(self, tokens: list[list[int]], response_lengths: list[int]) -> list[list[float]]:
        """What the critic expects before each response token."""
        if self.critic is None:
            raise StackError(
                "There is no critic.", fix="set training.advantage_estimator: ppo to have one."
            )
        rows: list[list[float]] = [[] for _ in tokens]
        for members, packed in self.parts(tokens, response_lengths):
            parts = self.critic.values(packed).split([response_lengths[i] for i in members])
            for index, part in zip(members, parts, strict=True):
                rows[index] = part.tolist()
        return rows

    def _all_log_probs(
        self, tokens: list[list[int]], response_lengths: list[int], models: Sequence[Policy]
    ) -> list[list[torch.Tensor]]:
        """By model and sample, on the device; computed on every rank for all samples."""
        out = [[torch.empty(0)] * len(tokens) for _ in models]
        with out_of_memory(self.settings.max_tokens, models):
            limit = self.settings.max_tokens_forward
            parts = packed_parts(tokens, response_lengths, limit, self.device)
            for members, packed in parts:
                lengths = [response_lengths[i] for i in members]
                self.stop_sign.look()
                for rows, model in zip(out, models, strict=True):
                    logp_R = without_gradient(model, packed, self.settings.temperature)[0]
                    for index, part in zip(members, logp_R.split(lengths), strict=True):
                        rows[index] = part
        return out

    def parts(
        self, tokens: list[list[int]], response_lengths: list[int]
    ) -> Iterator[tuple[list[int], Packed]]:
        """All samples in micro-batches: (indices, packed)."""
        return packed_parts(tokens, response_lengths, self.settings.max_tokens, self.device)

    def log_probs_before(
        self, batch: TrainBatch, old: bool = False
    ) -> tuple[list[torch.Tensor] | None, list[torch.Tensor] | None]:
        """(of the policy, if asked for; of the reference, where the loss has a KL), by sample."""
        models = [self.policy] if old else []
        if self.settings.training.kl_loss_coef and self.reference:
            models.append(self.reference)
        found = self._all_log_probs(batch.tokens, batch.response_lengths, models) if models else []
        return (
            found[0] if old else None,
            found[-1] if len(models) > int(old) else None,
        )
