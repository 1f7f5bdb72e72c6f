"""What the driver and the actors of a stack send each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

CacheUse = Literal["present", "none", "refilled"]
"""Prefixes that the engine takes from its cache as it is; none; or what the present weights have
just put there."""

ExpertRows: TypeAlias = "np.ndarray[Any, Any]"
"""Experts of a sample's tokens but the last: (tokens - 1, layers with experts, top k), uint8 or
uint16; the largest number of the dtype where nothing is known of a token."""

ExpertRecords: TypeAlias = "Sequence[ExpertRows | None] | None"
"""Those of some samples, None for one without; None where none has any."""

FIRST = ""
"""Among sessions that share a stack, the name of the one for which it was started."""

NEVER_HANDED = -1
"""The weight version of an engine that was started again, until it has the trainer's weights."""


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """Status of one engine when nothing runs in it any more."""

    weight_version: int
    interrupted: bool
    """Whether it was receiving weights, the rest of which will never come."""
    asleep: tuple[str, ...]
    """SGLang's names for what it has released."""


@dataclass(frozen=True, slots=True)
class TrainerStatus:
    """Status of one rank, between two calls."""

    updates: int
    last_update: tuple[str, list[dict[str, float]]] | None
    """The id of the last one, and the metrics of its steps."""
    update_seconds: float
    asleep: bool
    """Whether its weights and optimizer are in host memory."""
    snapshots: tuple[str, ...]
    """Names of the snapshots that it holds."""
    turn: str | None = FIRST
    """Of which session all this is; None where that has ended."""
    parked: tuple[str, ...] = ()
    """Other sessions whose states it holds."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Response of an engine to one prompt."""

    tokens: list[int]
    log_probs: list[float]
    finish: str
    """`stop`, `length` or `abort`."""
    weight_version: int
    experts: ExpertRows | None = None
    """Of the prompt's tokens and these but the last, by layer with experts; None where the engine
    does not report them, or had read nothing yet."""
    spec_info: dict[str, int] | None = None
    """Where the engine drafts: see `Sample.spec_info`."""
    drafted: list[int] | None = None
    """Where the engine drafts: see `Sample.rollout_drafted`."""


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Settings by which the tokens of one call are drawn."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response, besides those that the model's files name."""
    adapter: str = ""
    """Which adapter writes, where the engine has some beside its weights; empty for the first."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """A sample's log-probs, recomputed by the engine."""

    log_probs: list[float]
    """Log-prob of each response token at temperature 1: SGLang scales only what it samples."""
    experts: ExpertRows | None = None
    """None where the engine does not report them."""


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """N samples that an update trains on. What is by token has one list a sample."""

    tokens: list[list[int]]
    response_lengths: list[int]
    loss_masks: list[list[int]]
    advantages: list[float]
    rollout_log_probs: list[list[float]] | None
    token_advantages: list[list[float]] | None = None
    """Where the tokens of a sample have advantages of their own."""
    values: list[list[float]] | None = None
    """With a critic: its values when the advantages were computed."""
    returns: list[list[float]] | None = None
    """With a critic: the targets of its values."""
    experts: ExpertRecords = None
    """Experts that a pass over each sample took: the engine's, or an earlier one of the policy."""
    replayed: bool = False
    """Whether the policy's passes follow `experts`; otherwise they are only compared with them."""

    def __len__(self) -> int:
        return len(self.tokens)
