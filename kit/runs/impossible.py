"""Values of the right type that still cannot be: found before a kernel starts.

A notebook's parameters are called what the kit's settings are called, so the settings' own bounds
hold for them: a `learning_rate` of -1 or an `advantage_estimator` that nobody knows would stop the
notebook a minute later.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from kit.errors import RunError, did_you_mean

STEPS = ("steps", "num_rollout")
_OWN = ("seed", "device")
_SECTIONS = ("training", "rollout", "evaluation")


def refuse(name: str, value: Any, default: Any, choices: Sequence[Any] = ()) -> None:
    """Raise RunError where a parameter of this name cannot take this value.

    Args:
        name: the parameter's.
        value: of its type.
        default: the notebook's own value; what is wrong with that too is no reason to refuse.
        choices: the only values it takes, where they are known.
    """
    if value == default or value is None:
        return
    if choices and value not in choices:
        _say(name, value, did_you_mean(str(value), map(str, choices)))
    if name in STEPS and isinstance(value, int) and value < 0:
        _say(name, value, "give 0 or more.")
    if name == "preset" and isinstance(value, str):
        _refuse_preset(value, default)
    _refuse_setting(name, value)


def _refuse_preset(value: str, default: Any) -> None:
    from kit.presets import PRESETS

    if default in PRESETS and value not in PRESETS and not Path(value).suffix:
        _say("preset", value, did_you_mean(value, PRESETS))


def _refuse_setting(name: str, value: Any) -> None:
    """By the bounds of the setting that has this name, if one of the configuration has."""
    from kit.config import SessionConfig

    config: type[BaseModel] = SessionConfig
    places: list[tuple[Any, Sequence[str]]] = [(config, _OWN)]
    for section in (config.model_fields[part].annotation for part in _SECTIONS):
        places.append((section, tuple(getattr(section, "model_fields", ()))))
    for section, names in places:
        if name not in names:
            continue
        field = section.model_fields[name]
        kind: Any = field.annotation
        for bound in field.metadata:
            kind = Annotated[kind, bound]
        try:
            TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            first = error.errors()[0]
            known = first.get("ctx", {}).get("expected", "")
            words = known.replace("'", "").replace(" or ", ", ").split(", ") if known else []
            fix = did_you_mean(str(value), words) if words else first["msg"] + "."
            _say(name, value, fix)
        except Exception:  # a type that pydantic cannot check by itself
            return
        return


def _say(name: str, value: Any, fix: str) -> None:
    raise RunError(f"Parameter {name!r} cannot be {value!r}.", fix=fix)
