"""Settings that may change while a session runs, and the change itself.

    with_changes(config, {"learning_rate": 1e-5, "rollout.temperature": 0.8})

All others were read when processes started, prompts were loaded or memory was planned.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.config.schema import SessionConfig
from kit.config.sections import CheckpointConfig, EvaluationConfig, MismatchConfig
from kit.config.training import TrainingConfig
from kit.errors import ConfigError, did_you_mean

FIXED_IN_TRAINING = frozenset(
    {
        "num_trainers",
        "max_tokens_per_gpu",
        "optimizer",
        "optimizer_cpu_offload",
        "ref_update_interval",
        "true_on_policy",
    }
)
"""What trainers were started with; whether the reference moves decides what a checkpoint holds."""

CHANGEABLE = frozenset(
    {f"training.{name}" for name in TrainingConfig.model_fields.keys() - FIXED_IN_TRAINING}
    | {f"rollout.{name}" for name in ("temperature", "top_p", "top_k")}
    | {f"rollout.{name}" for name in ("dynamic_sampling", "dynamic_sampling_max_rounds")}
    | {f"evaluation.{name}" for name in EvaluationConfig.model_fields}
    | {f"checkpoint.{name}" for name in CheckpointConfig.model_fields}
    | {f"mismatch.{name}" for name in MismatchConfig.model_fields}
    | {"reward.timeout", "memory.snapshots_gib"}
)
"""Settings that may change while a session runs, by their full names."""

EVERY = frozenset(
    f"{section}.{name}"
    for section, field in SessionConfig.model_fields.items()
    for name in getattr(field.annotation, "model_fields", ())
)
"""All settings of sections, by their full names."""

SHAPES_SAMPLES = frozenset(name for name in CHANGEABLE if name.startswith("rollout."))
"""Those of them that decide, beside `training`, what a step computes; an undo takes them back."""


def values(config: SessionConfig, names: frozenset[str]) -> dict[str, Any]:
    """Values of settings, by their full names, in JSON's types."""
    tree = config.model_dump(mode="json")
    return {name: _at(tree, name) for name in sorted(names)}


def _at(tree: Mapping[str, Any], name: str) -> Any:
    for part in name.split("."):
        tree = tree[part]
    return tree


def full_names(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes by their full names; without a section, a name of `training` is meant first.

    Raises:
        ConfigError: a setting that is unknown, or that may not change while a session runs.
    """
    full = {}
    for name, value in changes.items():
        here = name if "." in name else f"training.{name}"
        if here not in CHANGEABLE and "." not in name:
            homes = sorted(known for known in CHANGEABLE if known.endswith(f".{name}"))
            if len(homes) > 1:
                raise ConfigError(
                    f"{name!r} could be {' or '.join(homes)}.",
                    fix=f"name the section too: {{{homes[-1]!r}: {value!r}}}.",
                )
            here = homes[0] if homes else here
        top = ".".join(here.split(".")[:2])  # `training.critic.learning_rate` is of `training`
        if here not in CHANGEABLE and top not in CHANGEABLE:
            raise _refusal(name)
        full[here] = value
    return full


def _refusal(name: str) -> ConfigError:
    section, _, last = name.rpartition(".")
    field = SessionConfig.model_fields.get(section.split(".")[0]) if section else None
    part = field.annotation if field else None
    known = getattr(part, "model_fields", SessionConfig.model_fields)
    if last in known or name in FIXED_IN_TRAINING:
        return ConfigError(
            f"{name} cannot change while the session runs.",
            why="It was read when its processes started, its data was loaded or its memory was "
            "planned.",
            fix="start a new session with it, or save this one: RLSession.load(path) continues.",
        )
    short = {each.partition(".")[2] for each in CHANGEABLE}
    return ConfigError(
        f"There is no setting {name!r} that could change while the session runs.",
        fix=did_you_mean(name if section else last, CHANGEABLE if section else short),
    )


def with_changes(config: SessionConfig, changes: Mapping[str, Any]) -> SessionConfig:
    """Return the settings with these changes, validated together.

    Args:
        config: the settings of a running session.
        changes: by name.

    Raises:
        ConfigError: a setting that cannot change while a session runs, or a value that cannot be.
    """
    tree: dict[str, Any] = config.model_dump(mode="json")
    for name, value in full_names(changes).items():
        *sections, last = name.split(".")
        branch = tree
        for section in sections:
            branch = branch[section]
        branch[last] = value
    new = type(config)(**tree)
    _refuse_other_networks(config.training, new.training, adapters=config.model.lora is not None)
    return new


def _refuse_other_networks(old: TrainingConfig, new: TrainingConfig, *, adapters: bool) -> None:
    """Raise ConfigError where an update would need a network that was not loaded.

    With adapters the reference is the policy without them, and always there.
    """
    if new.has_reference and not (old.has_reference or adapters):
        raise ConfigError(
            "kl_loss_coef and kl_coef need a reference model, and this session has none.",
            fix="start a session with training.kl_loss_coef or kl_coef above 0.",
        )
    if (new.draft is None) != (old.draft is None):
        raise ConfigError(
            "training.draft cannot be set or taken away while the session runs.",
            why="It says whether trainers have a draft; its numbers can change.",
            fix="start a session with it; or set training.draft.learning_rate: 0 for a while.",
        )
    if old.draft and new.draft and old.draft.loss != new.draft.loss:
        raise ConfigError(
            f"training.draft.loss cannot change from {old.draft.loss} to {new.draft.loss} while "
            "the session runs.",
            why="The memory of its updates was planned for the one.",
            fix="start a session with the other.",
        )
    if (new.advantage_estimator == "ppo") != (old.advantage_estimator == "ppo"):
        raise ConfigError(
            f"advantage_estimator cannot change from {old.advantage_estimator} to "
            f"{new.advantage_estimator}.",
            why="ppo has a critic, the others have none.",
            fix="start a session with it.",
        )
