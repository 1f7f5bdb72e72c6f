"""The frozen results of the verbs. Each shows itself in a notebook and in a terminal.

Numbers are kept under Miles' metric names (`train/pg_loss`, `rollout/raw_reward`, ...); the
picture of each result is drawn by `kit.viz` when somebody looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kit.samples import Rollout

Metrics = dict[str, float]
Verdict = Literal["pass", "warn", "fail"]
Cause = Literal[
    "none",
    "stale_weights",
    "stale_prefix_cache",
    "temperature",
    "processed_log_probs",
    "tokenization",
    "chat_template",
    "precision",
    "dropout",
    "packing",
    "expert_routing",
    "unknown",
]
"""Why trainer and engine disagree; `none` where they do not."""
TrainingState = Literal["ready", "running", "paused", "stopped", "finished", "failed"]
"""`ready` is paused before the first step; the last three are ends."""


class Shown:
    """A result that `kit.viz.show_report` knows how to draw."""

    __slots__ = ()

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.viz import show_report

        return show_report(self)

    def __str__(self) -> str:
        return self._repr_mimebundle_()["text/plain"]


@dataclass(frozen=True, slots=True)
class UpdateReport(Shown):
    """What one `update` did to the weights."""

    step: int
    metrics: Metrics
    """`train/...` means over the optimizer steps of this update."""
    per_step: tuple[Metrics, ...]
    """The same, one entry an optimizer step."""
    samples: int
    tokens: int
    """Trained tokens (prompt and response, as packed)."""
    seconds: float
    left_out: tuple[str, ...] = ()
    """Groups that did not train, and why."""
    applied: bool = True
    """False where this step had been applied before and nothing was done again."""


@dataclass(frozen=True, slots=True)
class SyncReport(Shown):
    """Trainer weights handed to the engine."""

    weight_version: int
    seconds: float
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class TokenDifference:
    """One token on which trainer and engine disagree."""

    sample_index: int
    position: int
    """Place in the response, from 0."""
    token: str
    rollout_log_prob: float
    train_log_prob: float
    before: str = ""
    """A few tokens to its left, the end of the prompt included."""
    after: str = ""
    """A few tokens to its right."""

    @property
    def difference(self) -> float:
        """Trainer minus rollout, in nats."""
        return self.train_log_prob - self.rollout_log_prob


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """Tokens that are alike in one thing, and how far both sides are apart on them."""

    low: float
    high: float
    mean_abs_diff: float
    tokens: int


@dataclass(frozen=True, slots=True)
class MismatchReport(Shown):
    """Do trainer and engine give the same log-probabilities to the rollout's tokens?"""

    verdict: Verdict
    cause: str
    """What explains the verdict, and what to do about it."""
    mean_abs_diff: float
    """Mean over unmasked response tokens of |trainer - rollout| log-prob, in nats."""
    max_abs_diff: float
    kl_k1: float
    """KL(rollout || trainer) in nats per token, plain mean: unbiased, may be below 0."""
    kl_k3: float
    """The same, k3 estimate: less noise, never below 0."""
    tokens: int
    warn_above: float
    fail_above: float
    worst: tuple[TokenDifference, ...] = ()
    trainer_version: int = 0
    rollout_versions: tuple[int, ...] = ()
    """Every weight version that wrote a token of the rollout."""
    cause_kind: Cause = "none"
    """The cause, for programs."""
    evidence: tuple[str, ...] = ()
    """What was looked at to find the cause, and what was found; one line each."""
    quantiles: dict[float, float] = field(default_factory=dict)
    """|trainer - rollout| that this share of the tokens does not exceed, by share."""
    ratio_range: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest of trainer's over engine's probability of a token."""
    effective_sample_size: float = 1.0
    """What reweighting by these ratios would leave of the tokens, as a share of 1."""
    by_position: tuple[CurvePoint, ...] = ()
    """Over the place in the response, first and last place of each point."""
    by_probability: tuple[CurvePoint, ...] = ()
    """Over the probability that the engine gave."""


@dataclass(frozen=True, slots=True)
class Invariant:
    """One thing that holds in a healthy session."""

    name: str
    value: float | None
    """What was seen; None where it could not be looked at."""
    bound: str
    """What it has to be, in words: `0 within 1e-09`."""
    holds: bool | None
    """None where it could not be looked at."""
    note: str = ""
    """What it means, or why it was not looked at."""


@dataclass(frozen=True, slots=True)
class CheckReport(Shown):
    """The invariants of a healthy start."""

    invariants: tuple[Invariant, ...]
    mismatch: MismatchReport
    seconds: float

    @property
    def healthy(self) -> bool:
        """No invariant that could be looked at is broken."""
        return all(invariant.holds is not False for invariant in self.invariants)


@dataclass(frozen=True, slots=True)
class EvalReport(Shown):
    """Accuracy on held-out prompts."""

    dataset: str
    accuracy: float
    """Mean reward over all responses; with 0/1 rewards, the share that is right."""
    prompts: int
    n_samples_per_prompt: int
    temperature: float
    pass_at_k: dict[int, float]
    """Unbiased estimate that at least one of k responses has reward 1, by k."""
    rollout: Rollout
    step: int
    seconds: float
    left_out: int = 0
    """Responses whose reward failed; they count in no average."""

    @property
    def metrics(self) -> Metrics:
        """Under Miles' name."""
        return {f"eval/{self.dataset}": self.accuracy}


@dataclass(frozen=True, slots=True)
class StepReport(Shown):
    """One whole step: generate, score, advantages, update, sync."""

    step: int
    metrics: Metrics
    rollout: Rollout
    update: UpdateReport
    sync: SyncReport
    mismatch: MismatchReport | None = None
    evaluation: EvalReport | None = None


@dataclass(frozen=True, slots=True)
class TrainReport(Shown):
    """The steps of one `train`, with their curves."""

    steps: tuple[StepReport, ...] = ()
    evaluations: tuple[EvalReport, ...] = ()
    seconds: float = 0.0
    stopped: str = ""
    """Why training ended early; empty where it ran to its end."""
    history: tuple[Metrics, ...] = field(default=())
    """One row of metrics a step, from the session's first step on."""

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepReport]:
        return iter(self.steps)

    def curve(self, name: str) -> list[float]:
        """One metric over the session's steps. Steps that did not log it are left out."""
        return [row[name] for row in self.history if name in row]


@dataclass(frozen=True, slots=True)
class TrainingStatus(Shown):
    """A training at one moment. Shows itself as the picture that the dashboard draws."""

    state: TrainingState
    total: int
    """Steps that were asked for."""
    done: int = 0
    asked: Literal["", "run", "pause", "stop"] = ""
    """What was asked for and waits: for the step under way to end, or for a verb."""
    step: int = 0
    """Updates that the session has applied, those before this training included."""
    history: tuple[Metrics, ...] = ()
    """One row of metrics a step, from the session's first step on."""
    last: StepReport | None = None
    """The newest step of this training."""
    step_seconds: float = math.nan
    """Mean over the last steps, evaluations included."""
    stopped: str = ""
    """Why it ended early; empty where it did not."""
    error: str = ""
    """What the exception said, where it failed."""

    @property
    def ended(self) -> bool:
        """Will there be no further step?"""
        return self.state in ("stopped", "finished", "failed")

    @property
    def seconds_left(self) -> float:
        """Until all steps are done, at the pace of the last ones; NaN before the first."""
        return self.step_seconds * (self.total - self.done)
