"""`WhatIf`: one update under several settings, side by side; each was undone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from kit.config import TrainingConfig
from kit.reports.training import UpdateReport
from kit.samples import Batch, Rollout
from kit.utils.display import Shown


@dataclass(frozen=True, slots=True)
class Movement:
    """Change of log-probs by an update, over the tokens that it trained on."""

    tokens: int
    mean_abs: float
    """Mean |new - old| log-prob, in nats."""
    largest: float
    """The largest of them."""
    kl: float
    """KL(old || new) a token, k3 estimate on the tokens that the old weights wrote."""
    praised: float
    """Mean change of tokens with a positive advantage."""
    blamed: float
    """Mean change of tokens with a negative advantage."""
    as_meant: float
    """Share of moved tokens whose log-prob moved in the direction of their advantage."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to make the update."""

    label: str
    """What is different, in words."""
    changed: dict[str, Any]
    """The settings that are."""
    training: TrainingConfig = field(repr=False)
    update: UpdateReport | None
    """None where it was refused."""
    movement: Movement | None
    after: Rollout | None = field(repr=False)
    """The batch's samples; each token with its log-prob before and after."""
    refused: str = ""
    """What the trainer said instead."""


@dataclass(frozen=True, slots=True)
class WhatIf(Shown, Sequence[Trial]):
    """Several ways to make one update, side by side; the first is the configured one."""

    trials: tuple[Trial, ...]
    batch: Batch = field(repr=False)
    before: Rollout = field(repr=False)
    """The batch's samples; each token with its log-prob before any of the updates."""
    step: int
    """Updates that the weights had, from which each trial began."""
    weight_version: int
    snapshot: str
    """The snapshot from which each began; empty where it was the session as it stood."""
    seconds: float
    notes: tuple[str, ...] = ()
    """What is to know before reading the numbers."""

    def __len__(self) -> int:
        return len(self.trials)

    def __getitem__(self, index: Any) -> Any:
        return self.trials[index]

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)
