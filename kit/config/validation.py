"""Checks of settings that depend on each other, and the error that says what to change.

`check_rollout_policies` runs when a `SessionConfig` is made, before anything starts. `explain`
turns pydantic's validation errors into one ConfigError.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from kit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from kit.config.sections import RolloutConfig
    from kit.config.training import TrainingConfig


def check_rollout_policies(rollout: RolloutConfig, training: TrainingConfig) -> None:
    """Raise ValueError for rollout settings that contradict each other or would have no effect."""
    at_once, prompts = rollout.over_sampling_batch_size, training.rollout_batch_size
    if at_once is not None and at_once < prompts:
        raise ValueError(
            f"rollout.over_sampling_batch_size is {at_once}, fewer than the {prompts} prompts of "
            f"training.rollout_batch_size. What to do: give it more than {prompts}, or leave it "
            f"out."
        )
    surplus = at_once is not None and (at_once > prompts or rollout.dynamic_sampling)
    if rollout.partial_rollout and not surplus:
        raise ValueError(
            "rollout.partial_rollout continues what was aborted, and nothing is: "
            f"over_sampling_batch_size is {at_once}. What to do: set "
            f"rollout.over_sampling_batch_size above rollout_batch_size ({prompts}), such as "
            f"{2 * prompts}."
        )
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        raise ValueError(
            "rollout.mask_offpolicy_in_partial_rollout masks what older weights wrote, and without "
            "partial_rollout they write nothing. What to do: set rollout.partial_rollout: true, or "
            "leave the mask out."
        )
    if rollout.dynamic_sampling and training.n_samples_per_prompt == 1:
        raise ValueError(
            "rollout.dynamic_sampling compares the rewards of a group, and "
            "training.n_samples_per_prompt is 1. What to do: set it to 2 or more."
        )


def explain(
    error: ValidationError, root: type[BaseModel], settings: Mapping[str, Any]
) -> ConfigError:
    """Make a ConfigError with a line for each wrong setting: key, value, and what to do."""
    lines = [_line(dict(item), root) for item in error.errors()]
    if len(lines) == 1:
        return ConfigError(lines[0])
    return ConfigError(f"{len(lines)} settings are wrong:\n" + "\n".join(f"- {x}" for x in lines))


def _line(item: dict[str, Any], root: type[BaseModel]) -> str:
    path = [str(part) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"There is no setting {key!r}. {_suggest(path, root)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    given = f"{item['input']!r} ({type(item['input']).__name__})"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {given}, but it is a section: write its settings below it."
    return f"{key} is {given}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _suggest(path: list[str], root: type[BaseModel]) -> str:
    """Suggest the nearest key of the same section, or the section that has a key of this name."""
    section = root
    for part in path[:-1]:
        section = _child(section, part) or section
    homes = [name for name in _sections(root) if path[-1] in _keys(root, name)]
    if homes:
        return f"Did you mean {homes[0]}.{path[-1]}?"
    return did_you_mean(path[-1], section.model_fields)


def _child(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = section.model_fields.get(name)
    kind = field.annotation if field else None
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _sections(root: type[BaseModel]) -> list[str]:
    return [name for name in root.model_fields if _child(root, name)]


def _keys(root: type[BaseModel], section: str) -> list[str]:
    child = _child(root, section)
    return list(child.model_fields) if child else []
