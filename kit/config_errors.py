"""Turns pydantic's validation errors into one ConfigError that says what to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from kit.errors import ConfigError, did_you_mean


def explain(
    error: ValidationError, root: type[BaseModel], settings: Mapping[str, Any]
) -> ConfigError:
    """One line for each wrong setting, with its full key, its value and the way out."""
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
    """The nearest key of the same section; else the section that has a key of this name."""
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
