"""Results that explain: what the machine lacks, trainer against engine, a healthy start, a reward.

`Diagnosis` and its `Finding`s, `MismatchReport`, `CheckReport` and `RewardTrial`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from kit.errors import KitError
from kit.samples import Rollout, Sample
from kit.utils.display import Shown, pictures

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One requirement of a session, and its state on this machine."""

    name: str
    level: Level
    """`ok` is in order, `note` is good to know, `problem` keeps a session from starting well."""
    found: str
    fix: str = ""
    """What to do next; empty where there is nothing to do."""
    commands: tuple[str, ...] = ()
    """Lines to copy into a terminal, in this order."""

    @classmethod
    def of_error(cls, name: str, error: KitError) -> Finding:
        """The problem that starting a session would raise."""
        return cls(name, "problem", " ".join(filter(None, (error.what, error.why))), error.fix)


@dataclass(frozen=True, slots=True)
class Diagnosis(Shown):
    """Whether a session with these settings can start on this machine, check by check."""

    name: str
    """The name of the configuration."""
    model: str
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def problems(self) -> tuple[Finding, ...]:
        """The findings that keep a session from starting well."""
        return tuple(finding for finding in self.findings if finding.level == "problem")

    @property
    def ready(self) -> bool:
        """Whether nothing that was looked at is a problem."""
        return not self.problems


Verdict = Literal["pass", "warn", "fail"]
Cause = Literal[
    "none",
    "stale_weights",
    "adapter",
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
    """A bin of tokens, and the mean difference of both sides in it."""

    low: float
    high: float
    mean_abs_diff: float
    tokens: int


@dataclass(frozen=True, slots=True)
class MismatchReport(Shown):
    """How far trainer and engine agree on the log-probabilities of a rollout's tokens."""

    verdict: Verdict
    cause: str
    """What explains the verdict, and what to do about it."""
    mean_abs_diff: float
    """Mean over unmasked response tokens of |trainer - rollout| log-prob, in nats."""
    max_abs_diff: float
    kl_k1: float
    """KL(rollout || trainer) in nats per token, plain mean: unbiased, may be below 0."""
    kl_k3: float
    """The k3 estimate of that KL: less noise, never below 0."""
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

    @property
    def exact(self) -> bool:
        """Whether both sides' log-probs are equal to the bit, as `true_on_policy` promises."""
        return self.verdict == "pass" and self.tokens > 0 and self.max_abs_diff == 0.0


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
        """Whether no invariant that could be looked at is broken."""
        return all(invariant.holds is not False for invariant in self.invariants)


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Samples that a reward failed on with the same message."""

    message: str
    traceback: str
    """The first sample's; empty where the function returned something that is no number."""
    samples: tuple[Sample, ...]


@dataclass(frozen=True, slots=True)
class Scoring:
    """Scores of one reward over a rollout."""

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
        rewards = [[sample.reward for sample in s.rollout] for s in (self.tried, self.against)]
        differences = [
            None if one is None or other is None else one - other
            for one, other in zip(*rewards, strict=True)
        ]
        numbers = {"against": rewards[1], "difference": differences}
        if any(seconds is not None for seconds in self.tried.call_seconds):
            numbers["seconds"] = list(self.tried.call_seconds)
        return pictures().browse(self.tried.rollout, numbers=numbers)
