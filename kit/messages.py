"""Where an engine and a trainer are, as they tell a driver who does not know."""

from __future__ import annotations

from dataclasses import dataclass

NEVER_HANDED = -1
"""The weight version of an engine that was started again, until it has the trainer's weights."""


@dataclass(frozen=True, slots=True)
class EngineStanding:
    """Of one engine, when nothing runs in it any more."""

    weight_version: int
    interrupted: bool
    """Was it taking weights, of which the rest will never come?"""
    asleep: tuple[str, ...]
    """SGLang's names for what it has let go of."""


@dataclass(frozen=True, slots=True)
class TrainerStanding:
    """Of one rank, between two calls."""

    updates: int
    last_update: tuple[str, list[dict[str, float]]] | None
    """The id of the last one, and the metrics of its steps."""
    update_seconds: float
    asleep: bool
    """Is it in host memory?"""
    snapshots: tuple[str, ...]
    """Names of those that it holds."""


@dataclass(frozen=True, slots=True)
class Generation:
    """One response as the engine returns it."""

    tokens: list[int]
    log_probs: list[float]
    finish: str
    """`stop`, `length` or `abort`."""
    weight_version: int


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the tokens of one call are drawn."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rescored:
    """One sample as the engine sees it now."""

    log_probs: list[float]
    """Of each response token, at temperature 1: SGLang scales only what it samples."""
    experts: list[list[list[int]]] | None = None
    """Experts of each token but the last, by layer: (tokens, layers, top k). None where the engine
    does not report them."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """What an update trains on: N samples. What is by token has one list a sample."""

    tokens: list[list[int]]
    response_lengths: list[int]
    loss_masks: list[list[int]]
    advantages: list[float]
    rollout_log_probs: list[list[float]] | None
    token_advantages: list[list[float]] | None = None
    """Where the tokens of a sample have advantages of their own."""
    values: list[list[float]] | None = None
    """With a critic: what it said when the advantages were made."""
    returns: list[list[float]] | None = None
    """With a critic: what it should have said."""

    def __len__(self) -> int:
        return len(self.tokens)
