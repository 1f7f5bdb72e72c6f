"""`Experiments`: recomputations by engine and trainer on the samples that differ most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.diagnostics.annotate import as_scored
from kit.diagnostics.mismatch import curves
from kit.reports import Cause, MismatchReport
from kit.samples import Sample

if TYPE_CHECKING:
    from kit.messages import CacheUse, ExpertRecords
    from kit.rollout.sampler import PromptSampler
    from kit.stack.stack import Stack
    from kit.trainer.probes import Quantized


Rows = Sequence[Sequence[float]]

MAX_SAMPLES = 16
"""So many of the samples that differ most are computed again."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one probe. A `kind` says that it explains the difference."""

    evidence: tuple[str, ...]
    kind: Cause | None = None
    words: str = ""
    """The cause and what to do about it, where there is one."""


@dataclass(frozen=True)
class Experiments:
    """Experiments on the samples that differ most."""

    config: SessionConfig
    stack: Stack
    sampler: PromptSampler
    report: MismatchReport
    engine_version: int
    samples: list[Sample]
    trained: list[list[float]]
    """The trainer's log-probs of these samples, as the check computed them."""

    @property
    def recorded(self) -> Rows:
        """Log-probs recorded in the rollout."""
        return [s.rollout_log_probs or [] for s in self.samples]

    @property
    def temperature(self) -> float:
        """Temperature of the trainer's log-probs."""
        return self.config.rollout.temperature

    @cached_property
    def observed(self) -> float:
        """Mean |trainer - rollout| over these samples, to be explained."""
        return self.gap(self.trained, self.recorded)

    @cached_property
    def rounding(self) -> float:
        """What rounding in the trainer's dtype does to the log-probs of plain Transformers.

        The weights are the same, as they are for trainer and engine: those of the optimizer are
        finer, and rounding them can move the log-probs of a trained model by far more.
        """
        if self.stack.dtype == "float32":
            return 0.0
        rows = self.plainly([self.stack.dtype, "float32"], rounded_to=self.stack.dtype)
        return self.gap(rows[self.stack.dtype], rows["float32"])

    def gap(self, one: Rows, other: Rows) -> float:
        """Mean |difference| over trained tokens that both sides have."""
        return curves.mean(
            [
                abs(a - b)
                for sample, row, with_row in zip(self.samples, one, other, strict=True)
                for a, b, active in zip(row, with_row, sample.mask, strict=False)
                if active
            ]
        )

    def explains_difference(self, after: float) -> bool:
        """Whether a change removes the difference; half of it may vanish by chance."""
        agrees = after <= self.report.warn_above
        if math.isnan(self.observed):
            return agrees
        return after <= self.observed / 10 or (agrees and after <= self.observed / 3)

    def recompute(self, *, packed: bool = True, training_mode: bool = False, seed: int = 0) -> Rows:
        """Recompute the trainer's log-probs; random dropping follows the seed."""
        rows: Rows = self.stack.probe(
            "recompute", self._tokens(), self.temperature, packed, training_mode, seed
        )
        return rows

    def sampled(self, ways: Sequence[tuple[float, float, int]]) -> list[Rows]:
        """The trainer's log-probs at each (temperature, top_p, top_k)."""
        from kit.trainer.probes import SamplingTransform

        transforms = [SamplingTransform(*way) for way in ways]
        rows: list[Rows] = self.stack.probe("sampled", self._tokens(), transforms)
        return rows

    def plainly(
        self,
        dtypes: Sequence[str],
        rounded_to: str | None = None,
        quantized: Quantized = "own",
        cache: str = "auto",
    ) -> dict[str, Rows]:
        """Log-probs of plain Transformers with the trainer's weights, by dtype."""
        how = list(dtypes), self.temperature, False, rounded_to, quantized, cache
        rows = self.stack.probe("plainly", self._tokens(), *how)
        return dict(zip(dtypes, rows, strict=True))

    def rescore(self, *, cache: CacheUse, experts: bool = False) -> list[list[Any]]:
        """Log-probs that each engine computes for the samples, at temperature 1."""
        tokens = self._tokens()
        return self.stack.rescore(
            tokens.tokens, tokens.response_lengths, cache=cache, experts=experts
        )

    def routing(self, forced: ExpertRecords = None) -> Any:
        """Experts that the trainer routes tokens to, its own or these; None without experts."""
        asked = replace(self._tokens(), experts=forced)
        return self.stack.probe("routing", asked, self.temperature)

    def with_tokens(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> Experiments:
        """Experiments on the same samples with other tokens."""
        changed = [
            replace(
                sample,
                tokens=[*prompt, *response],
                response_length=len(response),
                loss_mask=sample.loss_mask if len(response) == sample.response_length else None,
                rollout_drafted=None,
                rollout_routed_experts=None,  # of these tokens nobody knows any
            )
            for sample, prompt, response in zip(self.samples, prompts, responses, strict=True)
        ]
        return replace(self, samples=changed)

    def agreement(self) -> float:
        """Mean |difference| between recomputed and recorded log-probs of these tokens."""
        return self.gap(self.recompute(), self.recorded)

    def _tokens(self) -> Any:
        return as_scored(self.samples, self.config.training)


def worst_samples(samples: Sequence[Sample], trained: Rows) -> list[int]:
    """Indices of the samples that differ most."""

    def badness(index: int) -> float:
        recorded = samples[index].rollout_log_probs or []
        gaps = [abs(a - b) for a, b in zip(trained[index], recorded, strict=False)]
        uneven = len(recorded) != samples[index].response_length
        return math.inf if uneven else curves.badness(curves.mean(gaps))

    return sorted(sorted(range(len(samples)), key=badness, reverse=True)[:MAX_SAMPLES])
