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
