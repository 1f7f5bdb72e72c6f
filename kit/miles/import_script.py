"""`import_script`: the kit's configuration for a launch script of Miles."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from kit.config import SessionConfig, as_yaml
from kit.errors import ConfigError, did_you_mean
from kit.miles.export_script import settings_of
from kit.miles.flags import NONE, OWN_WAY, REASONS, SAME
from kit.miles.links import Given, get
from kit.miles.shell import read_script
from kit.miles.table import LINKS

_SGLANG = "--sglang-"


@dataclass(frozen=True, slots=True)
class Imported:
    """A configuration, and what it could not carry over from the script."""

    config: SessionConfig
    left_out: dict[str, str]
    """Why there is no setting for a flag, by the flag with its values."""
    unknown: dict[str, str]
    """Flags that Miles does not have either, as far as the kit knows, and what may be meant."""
    remarks: tuple[str, ...]
    """What was understood in part."""

    def report(self) -> str:
        """What was not carried over, one line each; "" if all was."""
        groups: dict[str, list[str]] = {}
        for flag, why in self.left_out.items():
            groups.setdefault(why, []).append(flag)
        lines = [f"{why}:\n    " + "\n    ".join(flags) for why, flags in groups.items()]
        lines += [f"{flag} is no flag of Miles. {what}" for flag, what in self.unknown.items()]
        return "\n".join([*lines, *self.remarks])


def import_script(path: str | Path) -> Imported:
    """Read a launch script of Miles as settings. The script is never run.

    Flags that it leaves out have Miles' defaults. The name is the script's.

    Raises ConfigError for a file that starts no train.py, for an invalid value, and for settings
    that contradict each other.
    """
    file = Path(path)
    script = read_script(file)
    given = Given(script.flags, list(script.remarks))
    tree: dict[str, Any] = {"name": file.stem}
    for link in LINKS:
        _put(tree, link.setting, link.read(given))
    left_out, unknown, extra = _others(given)
    if extra:
        _put(tree, "engine.extra", extra)
    if not tree["model"]["name"]:
        raise ConfigError(
            f"{file} names no --hf-checkpoint.", fix="add it: the kit starts from there."
        )
    try:
        config = SessionConfig(**tree)
    except ConfigError as error:
        raise ConfigError(f"{file} cannot be taken over as it is.\n{error}") from None
    return Imported(config, left_out, unknown, tuple(given.remarks))


def changed(config: SessionConfig) -> str:
    """The settings that differ from the kit's own defaults, as YAML."""
    tree: dict[str, Any] = {}
    defaults = SessionConfig()
    whole = config.model_dump(mode="json")
    for setting in settings_of():
        if get(config, setting) != get(defaults, setting):
            value: Any = whole
            for part in setting.split("."):
                value = value[part]
            _put(tree, setting, value)
    return as_yaml(tree)


def _put(tree: dict[str, Any], setting: str, value: Any) -> None:
    *sections, last = setting.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[last] = value


def _others(given: Given) -> tuple[dict[str, str], dict[str, str], dict[str, Any]]:
    """Flags without a setting: (known ones, unknown ones, further ones of SGLang)."""
    linked = {flag for link in LINKS for flag in link.flags}
    left_out: dict[str, str] = {}
    unknown: dict[str, str] = {}
    extra: dict[str, Any] = {}
    for flag, values in given.flags.items():
        if flag in linked:
            continue
        shown = " ".join([flag, *values]) if flag != "--wandb-key" else flag
        key = flag.removeprefix(_SGLANG).replace("-", "_")
        if flag in REASONS:
            if REASONS[flag] != SAME and not (REASONS[flag] == OWN_WAY and values == ["1"]):
                left_out[shown] = REASONS[flag]
        elif flag.startswith(_SGLANG) and key in _sglang():
            words = [_word(word) for word in values] or [True]
            extra[key] = words[0] if len(words) == 1 else words
        elif flag.startswith("--eval-sglang-"):
            left_out[shown] = NONE
        else:
            near = linked | set(REASONS)
            if flag.startswith(_SGLANG):
                near = {f"{_SGLANG}{setting.replace('_', '-')}" for setting in _sglang()}
            nearest = did_you_mean(flag, near)
            unknown[flag] = nearest if nearest.startswith("Did") else "It is left out."
    return left_out, unknown, extra


@cache
def _sglang() -> set[str]:
    from kit.engine.server_args import sglang_settings

    return sglang_settings()


def _word(word: str) -> Any:
    """A number where the word reads as one, else the word."""
    if re.fullmatch(r"-?\d+", word):
        return int(word)
    try:
        return float(word)
    except ValueError:
        return word
