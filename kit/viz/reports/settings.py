"""`SessionConfig` as tables: every setting, what it does, and which ones were changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.config.section import Section
from kit.utils.display import Bundle, bundle
from kit.utils.formatting import count, shorten
from kit.viz.html import Child, Column, fold, join, note, page, quiet, table, tag, title, with_code
from kit.viz.render import render

if TYPE_CHECKING:
    from pydantic import BaseModel


@render.register(SessionConfig)
def show_config(config: SessionConfig) -> Bundle:
    """HTML: what differs from the defaults, and all settings folded by section; YAML text."""
    fields = type(config).model_fields
    sections = [name for name in fields if hasattr(getattr(config, name), "model_dump")]
    alone = [name for name in fields if name not in sections]
    rows = [_row(config, name, "") for name in changes(config) if name in alone]
    for name in sections:
        section = getattr(config, name)
        rows += [_row(section, changed, f"{name}.") for changed in changes(section)]
    html = page(
        title(f"Settings of {shorten(config.name, 60)}: {count(len(rows), 'setting')} changed"),
        _table(rows) if rows else None,
        note("All settings, by section:"),
        fold(_summary("session", config, alone), _settings(config, alone)),
        *(_section(name, getattr(config, name)) for name in sections),
    )
    return bundle(html, config.to_yaml())


def changes(section: BaseModel) -> list[str]:
    """The settings of a section that differ from their defaults."""
    fields = type(section).model_fields
    return [name for name in fields if getattr(section, name) != _default(section, name)]


def _default(section: BaseModel, name: str) -> Any:
    return type(section).model_fields[name].get_default(call_default_factory=True)


def _section(name: str, section: BaseModel) -> Child:
    names = list(type(section).model_fields)
    return fold(_summary(name, section, names), _settings(section, names))


def _summary(name: str, section: BaseModel, names: list[str]) -> Child:
    changed = len([one for one in changes(section) if one in names])
    words = f" {changed} of {len(names)} changed" if changed else " all defaults"
    return join(tag("b", name), quiet(words))


def _settings(section: BaseModel, names: list[str]) -> Child:
    return _table([_row(section, name) for name in names])


def _table(rows: list[list[Child]]) -> Child:
    return table(
        [Column("setting", "name"), Column("value", "mid"), Column("what it does", "hint")], rows
    )


def _row(section: BaseModel, name: str, before: str | None = None) -> list[Child]:
    value = shorten(_written(getattr(section, name)), 300)
    words = type(section).model_fields[name].description or ""
    mark = "● changed; " if before is None else ""  # a list of what was changed need not say so
    was = note(f"{mark}default {shorten(_written(_default(section, name)), 80)}")
    shown = join(tag("b", value), was) if name in changes(section) else value
    return [
        tag("span", (before or "") + name, class_="kv-text"),
        tag("div", shown, class_="kv-text"),
        tag("span", with_code(" ".join(words.split())), class_="kv-muted"),
    ]


def _written(value: Any) -> str:
    """A value as YAML readers know it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Section):
        value = value.model_dump(mode="json")
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_written(v)}" for k, v in value.items()) + "}"
    return '""' if value == "" else str(value)
