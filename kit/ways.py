"""Which other settings an update can be tried with, and what they make of the configured ones."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from kit.config import SessionConfig
from kit.config_training import TrainingConfig
from kit.errors import ConfigError, did_you_mean

AS_CONFIGURED = "as configured"
MOST = 12
"""Ways that are tried at once."""
Way = tuple[str, dict[str, Any], TrainingConfig]
"""(what is different in words, the settings that are, all settings)."""
CHANGEABLE = frozenset(
    {
        "learning_rate",
        "lr_schedule",
        "warmup_steps",
        "min_learning_rate",
        "adam_beta1",
        "adam_beta2",
        "adam_eps",
        "weight_decay",
        "clip_grad",
        "eps_clip",
        "eps_clip_high",
        "eps_clip_c",
        "kl_loss_coef",
        "kl_loss_type",
        "entropy_coef",
        "calculate_per_token_loss",
        "use_rollout_logprobs",
        "use_tis",
        "tis_clip",
        "tis_clip_low",
        "mis",
        "opsm_delta",
        "global_batch_size",
        "epochs_per_rollout",
    }
)
"""Settings that an update reads. Others are in the batch already, or in the processes."""


def ways_to_train(config: SessionConfig, changes: Mapping[str, Any]) -> list[Way]:
    """Every combination of these values; the configured way comes first, and none comes twice.

    Args:
        config: the session's.
        changes: by name of a training setting, a value or a list of values.

    Raises:
        ConfigError: a setting that an update does not read, a value that cannot be, or too many.
    """
    for name in changes:
        if name not in CHANGEABLE:
            raise ConfigError(
                f"what_if cannot change {name!r}.",
                why="It is in the batch's advantages or in the processes already, and an update "
                "does not read it."
                if name in TrainingConfig.model_fields
                else "",
                fix=did_you_mean(name, CHANGEABLE),
            )
    values = [list(v) if isinstance(v, (list, tuple)) else [v] for v in changes.values()]
    chosen = [dict(zip(changes, way, strict=True)) for way in itertools.product(*values)]
    if not changes or not chosen:
        raise ConfigError(
            "There is nothing to try.", fix="name a setting: session.what_if(lr=[1e-5, 1e-4])."
        )
    if len(chosen) > MOST:
        raise ConfigError(
            f"These lists make {len(chosen)} combinations; {MOST} are the most.",
            fix="give fewer values, or call what_if several times.",
        )
    configured = config.training
    ways: list[Way] = [(AS_CONFIGURED, {}, configured)]
    for changed in chosen:
        training = _with(config, changed)
        if training.kl_loss_coef and not configured.has_reference:
            raise ConfigError(
                "kl_loss_coef needs a reference model, and this session has none.",
                fix="start a session with training.kl_loss_coef above 0.",
            )
        if training not in (way[2] for way in ways):
            label = ", ".join(f"{name} {_worded(value)}" for name, value in changed.items())
            ways.append((label, changed, training))
    return ways


def _with(config: SessionConfig, changed: Mapping[str, Any]) -> TrainingConfig:
    tree = config.model_dump(mode="json")
    tree["training"] |= changed
    return SessionConfig(**tree).training


def _worded(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
