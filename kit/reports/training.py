"""The frozen results of the verbs. Each shows itself in a notebook and in a terminal.

Numbers are kept under Miles' metric names (`train/pg_loss`, `rollout/raw_reward`, ...); the
picture of each result is drawn by `kit.viz` when somebody looks at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from kit.reports.diagnostics import MismatchReport
from kit.samples import Rollout
from kit.utils.display import Shown

REWARD = "rollout/raw_reward"
"""The metric that everything is about."""
STEP = "step"
"""Number of a row's step in the history, from 0."""
Metrics = dict[str, float]


class History(list[Metrics]):
    """Metrics of all steps, one row each."""

    def to_pandas(self) -> Any:
        """A table with a row a step, `step` as its index."""
        return _table(self)


def _table(rows: Iterable[Metrics]) -> Any:
    """Rows as a table, with their steps as its index."""
    from pandas import DataFrame

    table = DataFrame(list(rows))
    return table.set_index(STEP) if STEP in table else table


@dataclass(frozen=True, slots=True)
class UpdateReport(Shown):
    """What one `update` did to the weights."""

    step: int
    metrics: Metrics
    """`train/...` means over the optimizer steps of this update."""
    per_step: tuple[Metrics, ...]
    """The metrics of each optimizer step."""
    samples: int
    tokens: int
    """Trained tokens (prompt and response, as packed)."""
    seconds: float
    left_out: tuple[str, ...] = ()
    """Groups that did not train, and why."""
    applied: bool = True
    """False where this step had been applied before and nothing was done again."""

    def to_pandas(self) -> Any:
        """A table with a row for each optimizer step."""
        return _table(self.per_step)


@dataclass(frozen=True, slots=True)
class SyncReport(Shown):
    """Trainer weights handed to the engine."""

    weight_version: int
    seconds: float
    tensors: int
    bytes: int
    verified: int | None = None
    """Parameters whose checksums were found equal on both sides; None where nobody looked."""
    merge_error: float | None = None
    """What rounding did to the adapters on their way, as a share of their size: 1 is all of it.
    None without adapters, while they add nothing, and where the engine computes in float32."""


@dataclass(frozen=True, slots=True)
class EvalReport(Shown):
    """Mean reward, accuracy and pass@k on held-out prompts."""

    dataset: str
    mean_reward: float
    """Over all responses that have a reward."""
    prompts: int
    n_samples_per_prompt: int
    temperature: float
    pass_at_k: dict[int, float]
    """Unbiased estimate that at least one of k responses has a reward of 1 or more, by k."""
    rollout: Rollout
    step: int
    seconds: float
    left_out: int = 0
    """Responses whose reward failed; they count in no average."""
    others: tuple[EvalReport, ...] = ()
    """Reports of further held-out sets, where there are several."""

    @property
    def sets(self) -> dict[str, EvalReport]:
        """Report of each held-out set, by its name."""
        return {each.dataset: each for each in (replace(self, others=()), *self.others)}

    @property
    def accuracy(self) -> float | None:
        """Share of responses that are right; None where a reward is neither 0 nor 1."""
        rewards = self.rollout.rewards()
        return self.mean_reward if rewards and {*rewards} <= {0.0, 1.0} else None

    @property
    def metrics(self) -> Metrics:
        """The mean reward of each held-out set under its metric name."""
        return {f"eval/{each.dataset}": each.mean_reward for each in (self, *self.others)}

    def to_pandas(self) -> Any:
        """A table with a row for each response, as `Rollout.to_pandas` has it.

        Where there are several held-out sets, the first column is `dataset`.
        """
        if not self.others:
            return self.rollout.to_pandas()
        import pandas as pd

        frames = {name: each.rollout.to_pandas() for name, each in self.sets.items()}
        return pd.concat(frames, names=["dataset"]).reset_index("dataset").reset_index(drop=True)


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
    trends: Mapping[str, str] = field(default_factory=dict)
    """Metrics whose course up to this step deserves a second look, and why."""


@dataclass(frozen=True, slots=True)
class TrainReport(Shown):
    """The steps of one `train`, with their curves."""

    steps: tuple[StepReport, ...] = ()
    evaluations: tuple[EvalReport, ...] = ()
    seconds: float = 0.0
    stopped: str = ""
    """Why training ended early; empty where it ran to its end."""
    history: tuple[Metrics, ...] = field(default=())
    """One row of metrics for each of its steps; those that a resumed run did not repeat too."""

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[StepReport]:
        return iter(self.steps)

    def curve(self, name: str) -> list[float]:
        """One metric over the training's steps. Steps that did not log it are left out."""
        return [row[name] for row in self.history if name in row]

    def to_pandas(self) -> Any:
        """A table with a row a step, `step` as its index; evaluations are in `eval/...`.

        An evaluation tells of the weights before the step of its number, a step's row of those
        after it; so one is in the row of the step before. One before the first step is in none.
        """
        return _table(self.history)


Until = Callable[[StepReport], bool]
