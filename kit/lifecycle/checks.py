"""What a session is refused or warned for by its settings and its model, before a process runs."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig, TrainingConfig
from kit.errors import ConfigError
from kit.rollout.batch import Advantage
from kit.utils.reading import read_json
from kit.utils.versions import installed_version

if TYPE_CHECKING:
    from kit.models.source import ModelSource


def check_functions(
    training: TrainingConfig, advantage: Advantage | None, loss: Callable[..., Any] | None
) -> None:
    """Raise ConfigError for own functions that could not be called, or that ppo cannot take."""
    if advantage is not None and not callable(advantage):
        raise ConfigError(
            f"advantage is {advantage!r}, and not a function.",
            fix="pass a function of a rollout; a built-in one is training.advantage_estimator.",
        )
    if advantage is not None and training.advantage_estimator == "ppo":
        raise ConfigError(
            "advantage= and advantage_estimator: ppo exclude each other.",
            why="The critic of ppo learns the returns that its own advantages are made of.",
            fix="choose another advantage_estimator, or leave advantage= out.",
        )
    if loss is not None:
        from kit.algo.own_loss import check_loss

        check_loss(loss)


def check_experts(config: SessionConfig, model: ModelSource) -> None:
    """Raise ConfigError if the experts of a model are to be replayed that has none."""
    training = config.training
    if model.experts or not training.replays_routing:
        return
    from kit.models.source import expert_count

    if expert_count(read_json(Path(model.path) / "config.json", unique=False)):
        return  # it has some, under names of its own: its family's record says what was tried
    name = "use_rollout_routing_replay" if training.use_rollout_routing_replay else ""
    raise ConfigError(
        f"training.{name or 'use_routing_replay'} is set, and {config.model.name} has no experts.",
        why=f"{model.architecture} sends every token through the same weights, so there is no "
        "choice to replay.",
        fix="leave the setting out, or train a mixture of experts, such as the preset tiny-moe.",
    )


def check_optimizer(training: TrainingConfig) -> None:
    """Raise ConfigError for an optimizer that is not installed."""
    if training.optimizer == "adamw8bit" and installed_version("torchao") is None:
        raise ConfigError(
            "training.optimizer is adamw8bit, which is torchao's, and it is not installed.",
            fix="install the locked versions: pip install -r requirements.lock.",
        )


def check_peft(config: SessionConfig) -> None:
    """Raise ConfigError if adapters are to be trained and PEFT is not installed."""
    if config.model.lora and installed_version("peft") is None:
        raise ConfigError(
            "model.lora trains adapters, which PEFT puts into the model, and it is not installed.",
            fix="install the locked versions: pip install -r requirements.lock.",
        )


def warn_of_dropout(name: str, settings: list[str]) -> None:
    """Warn of dropout that a model is configured with."""
    if settings:
        warnings.warn(
            f"The model {name!r} is configured with {', '.join(settings)}. It is switched off "
            "for training: the engine drops nothing, and with it the policy that is trained would "
            "not be the one that wrote the samples. Exports keep the setting.",
            stacklevel=5,
        )
