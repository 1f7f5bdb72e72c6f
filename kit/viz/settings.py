"""`SessionConfig` as tables: every setting, what it does, and which ones were changed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kit.viz.html import Bundle, Child, Column, bundle, fold, join, note, page, table, tag, title
from kit.viz.text import count, shorten

if TYPE_CHECKING:
    from pydantic import BaseModel

    from kit.config import SessionConfig


def show_config(config: SessionConfig) -> Bundle:
    """HTML with one fold a section, open where something differs from the defaults; YAML text."""
    fields = type(config).model_fields
    sections = [name for name in fields if hasattr(getattr(config, name), "model_dump")]
    alone = [name for name in fields if name not in sections]
    changed = len([name for name in changes(config) if name in alone])
    changed += sum(len(changes(getattr(config, name))) for name in sections)
    html = page(
        title(f"Settings of {shorten(config.name, 60)}: {count(changed, 'setting')} changed"),
        _settings(config, alone),
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
    changed = changes(section)
    words = f" {len(changed)} changed" if changed else " all defaults"
    summary = join((tag("b", name), tag("span", words, class_="kv-muted")))
    body = _settings(section, list(type(section).model_fields))
    return fold(summary, body, is_open=bool(changed))


def _settings(section: BaseModel, names: list[str]) -> Child:
    changed = changes(section)
    rows: list[list[Child]] = []
    for name in names:
        value = shorten(_written(getattr(section, name)), 300)
        words = type(section).model_fields[name].description or ""
        was = note(f"● changed; default {shorten(_written(_default(section, name)), 80)}")
        shown = join((tag("b", value), was)) if name in changed else value
        rows.append(
            [
                tag("span", name, class_="kv-text"),
                tag("div", shown, class_="kv-text"),
                tag("span", " ".join(words.split()), class_="kv-muted"),
            ]
        )
    heads = [Column("setting", "fit"), Column("value", "mid"), Column("what it does")]
    return table(heads, rows)


def _written(value: Any) -> str:
    """A value as YAML readers know it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_written(v)}" for k, v in value.items()) + "}"
    return '""' if value == "" else str(value)
