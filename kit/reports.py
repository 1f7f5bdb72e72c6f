"""The frozen results of the verbs. Each shows itself in a notebook and in a terminal.

Numbers are kept under Miles' metric names (`train/pg_loss`, `rollout/raw_reward`, ...); the
picture of each result is drawn by `kit.viz` when somebody looks at it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from kit.samples import Rollout, Sample

REWARD = "rollout/raw_reward"
"""The metric that everything is about."""
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
    verified: int | None = None
    """Parameters whose checksums were found equal on both sides; None where nobody looked."""


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
class SessionState(Shown):
    """Where a session stands; a session shows itself with it."""

    name: str
    state: str
    """`not started`, `running` or `closed`."""
    model: str
    parameters: int | None
    device: str
    dtype: str
    step: int
    """Updates applied."""
    planned: int
    """`training.num_rollout`."""
    weight_version: int
    """The trainer's."""
    engine_version: int
    last_reward: float | None
    """Mean reward of the last rollout; None before it is scored."""
    rewards: tuple[float, ...] = ()
    """Mean reward of each step so far."""
    waiting: int = 0
    """Groups that wait to be continued."""
    host_memory: int | None = None
    """Bytes that the stack's processes hold for themselves; None where there are none."""
    next_calls: tuple[tuple[str, str], ...] = ()
    """(call, what it does), the most likely one first."""


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
class RewardFailure:
    """Samples that a reward failed on with the same message."""

    message: str
    traceback: str
    """Of the first of them; empty where the function returned something that is no number."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Scoring:
    """What one reward made of a rollout."""

    name: str
    rollout: Rollout
    """Scored; samples that the reward failed on are marked and say why."""
    seconds: float
    """All calls together, as time passed."""
    call_seconds: tuple[float | None, ...]
    """One a sample: its own call. None where one call scored all samples, or none was made."""
    failures: tuple[RewardFailure, ...]
    """The most frequent first."""
    zero_variance_groups: int
    """Groups whose samples all have the same reward: nothing to learn."""
    left_out_groups: int
    """Groups with a sample without a reward: an update leaves them out whole."""

    @property
    def groups_to_learn_from(self) -> int:
        """Groups that an update would train on and learn something from."""
        return len(self.rollout.groups()) - self.zero_variance_groups - self.left_out_groups

    def slowest(self) -> list[tuple[Sample, float]]:
        """Each sample that had a call of its own, with its seconds, the slowest first."""
        timed = zip(self.rollout, self.call_seconds, strict=True)
        calls = [(sample, seconds) for sample, seconds in timed if seconds is not None]
        return sorted(calls, key=lambda call: -call[1])


@dataclass(frozen=True, slots=True)
class RewardDifference:
    """A sample that two rewards judge differently."""

    sample: Sample
    reward: float
    against: float

    @property
    def difference(self) -> float:
        """The tried reward minus the one it is compared with."""
        return self.reward - self.against


@dataclass(frozen=True, slots=True)
class RewardTrial(Shown):
    """A reward tried on a rollout beside another one, without training."""

    tried: Scoring
    against: Scoring
    differences: tuple[RewardDifference, ...]
    """Samples to which both gave a reward, and not the same; the largest difference first."""
    pairs_alike: int
    """Pairs of samples of one group that both rewards order alike, or both call equal."""
    pairs_told_apart_by_one: int
    """Pairs that only one of the two calls equal."""
    pairs_opposed: int
    """Pairs of which each reward prefers the other sample."""

    def to_pandas(self) -> Any:
        """One row a sample: the rollout's columns, then what both rewards made of it."""
        table = self.tried.rollout.to_pandas()
        other = self.against.rollout.to_pandas()
        return table.assign(
            against=other["reward"],
            difference=table["reward"] - other["reward"],
            against_error=other["error"],
            seconds=self.tried.call_seconds,
            against_seconds=self.against.call_seconds,
        )

    def browse(self) -> Any:
        """The rollout as the tried reward scored it, sample by sample; see `Rollout.browse`."""
        from kit.viz.browser import SampleBrowser

        rewards = [[sample.reward for sample in s.rollout] for s in (self.tried, self.against)]
        differences = [
            None if one is None or other is None else one - other
            for one, other in zip(*rewards, strict=True)
        ]
        numbers = {"against": rewards[1], "difference": differences}
        if any(seconds is not None for seconds in self.tried.call_seconds):
            numbers["seconds"] = list(self.tried.call_seconds)
        return SampleBrowser(self.tried.rollout, numbers=numbers)


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
