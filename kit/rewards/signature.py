"""How a reward is called: with one sample or all of them, awaited or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from kit.errors import RewardError
from kit.rewards.outcomes import code_owner, describe
from kit.rewards.registry import of_weights

Reward: TypeAlias = str | Mapping[str, float] | Callable[..., Any]
"""A built-in's name, weights by name, or a function of a sample or of all samples."""

_BATCH_NAMES = ("samples", "rollout", "batch")
_BATCH_TYPES = ("list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Rollout")


def reward_function(reward: Reward) -> Callable[..., Any]:
    """The function behind a name, weights or a function. Raises RewardError for anything else."""
    if isinstance(reward, str):
        return of_weights({reward: 1.0})
    if isinstance(reward, Mapping):
        return of_weights(reward)
    if not callable(reward):
        raise RewardError(
            f"A reward cannot be {describe(reward)}.",
            fix="give a built-in's name ('exact'), weights ({'math': 0.9, 'format': 0.1}) or a "
            "function of a sample.",
        )
    return reward


def takes_batch(function: Callable[..., Any]) -> bool:
    """Whether a function takes all samples at once.

    Raises RewardError if it cannot be called with one argument.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return False
    try:
        signature.bind(None)
    except TypeError:
        raise RewardError(
            f"The reward function takes {signature}, but is called with one argument.",
            fix="write `def reward(sample): ...` for one sample at a time, or "
            "`def reward(samples): ...` for all at once; sample.response, sample.label and "
            "sample.metadata hold the rest.",
        ) from None
    first = next(iter(signature.parameters.values()))
    return first.name in _BATCH_NAMES or _type_name(first.annotation) in _BATCH_TYPES


def _type_name(annotation: Any) -> str:
    """`Sequence` for Sequence[Sample], typing.Sequence and the text "Sequence[Sample]"."""
    if not isinstance(annotation, str):
        annotation = getattr(annotation, "__name__", str(annotation))
    return str(annotation).partition("[")[0].rpartition(".")[2]


def is_async(function: Callable[..., Any]) -> bool:
    """Whether calling a function gives something to await."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        code_owner(function)
    )
