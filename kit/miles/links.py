"""`Link`: one setting of the kit and the flags of Miles that mean the same; how each is written.

`Given`: the flags of a launch script, asked for one by one, with Miles' defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kit.config import SessionConfig
from kit.errors import ConfigError

CKPT, ROLLOUT, EVAL, GRPO = "CKPT", "ROLLOUT", "EVAL", "GRPO"


OPTIMIZER, PERF, SGLANG, LOG = "OPTIMIZER", "PERF", "SGLANG", "LOG"


GROUPS = (CKPT, ROLLOUT, EVAL, GRPO, OPTIMIZER, PERF, SGLANG, LOG)
"""Arrays of the script, in its order."""


Words = list[str]


Write = Callable[[SessionConfig, str], Words]
"""The flags for a configuration and a backend, ready for a shell but for quoting."""


@dataclass(slots=True)
class Given:
    """Flags that were given, and what reading them as settings has to say."""

    flags: Mapping[str, Sequence[str]]
    remarks: list[str] = field(default_factory=list)
    """What is not carried over as it is."""

    @property
    def backend(self) -> str:
        """Miles' trainer: `megatron`, its default, or `fsdp`."""
        return self.text("--train-backend", MEGATRON)

    def has(self, flag: str) -> bool:
        """Was it given?"""
        return flag in self.flags

    def all(self, flag: str) -> list[str]:
        """Its values; none where it was not given."""
        return list(self.flags.get(flag, ()))

    def text(self, flag: str, default: T) -> str | T:
        """Its only value, or the default."""
        if flag not in self.flags:
            return default
        values = self.flags[flag]
        if len(values) != 1:
            raise ConfigError(
                f"{flag} has {len(values)} values: {' '.join(values) or 'none'}.",
                fix="give it one.",
            )
        return values[0]

    def whole(self, flag: str, default: T) -> int | T:
        """Its only value as a whole number."""
        return self._number(flag, default, int)

    def number(self, flag: str, default: T) -> float | T:
        """Its only value as a number."""
        return self._number(flag, default, float)

    def _number(self, flag: str, default: T, kind: type) -> T:
        text = self.text(flag, None)
        if text is None:
            return default
        try:
            result: T = kind(text)
        except ValueError:
            words = "a whole number" if kind is int else "a number"
            raise ConfigError(f"{flag} is {text!r}.", fix=f"give it {words}.") from None
        return result


Read = Callable[[Given], Any]


Note = Callable[[SessionConfig, str], str]


class Variable(str):
    """A word that the shell puts something in place of: `$MODEL`."""


@dataclass(frozen=True, slots=True)
class Link:
    """What stands for one setting. Writing, then reading, gives it back where `note` is empty."""

    setting: str
    flags: tuple[str, ...]
    """The flags that it is made of, the main one first."""
    group: str
    """The array of the script that they belong to."""
    write: Write
    read: Read
    note: Note = lambda config, backend: ""
    """Why a value is not carried over as it is; empty where it is."""
    default: str = ""
    """What Miles does without the flag, in words."""
    remark: str = ""
    """For the table: what to know beside the names."""


READ_AS_FLAG = "would be read as a flag, and is left out"


def get(config: SessionConfig, setting: str) -> Any:
    """A setting by its name with dots."""
    value: Any = config
    for part in setting.split("."):
        value = getattr(value, part)
    return value


def value(
    setting: str,
    flag: str,
    group: str,
    default: str | int | float | None,
    *,
    explicit: bool = False,
    absent: object = ...,
    remark: str = "",
) -> Link:
    """A setting with one value and one flag.

    Args:
        setting: its name.
        flag: its flag.
        group: the array it goes to.
        default: Miles', which also says of what type it is; None is optional, of the setting's
            own type.
        explicit: write it also where it is the default.
        absent: the setting's value that stands for Miles' default; taken to be the same.
        remark: for the table.
    """
    missing = default if absent is ... else absent

    def write(config: SessionConfig, backend: str) -> Words:
        found = get(config, setting)
        if found in (None, "") or (found == missing and not explicit) or note(config, backend):
            return []
        return [flag, str(found)]

    def read(given: Given) -> Any:
        kind = _kind_of(setting)
        if kind is int:
            return given.whole(flag, missing)
        return given.number(flag, missing) if kind is float else given.text(flag, missing)

    def note(config: SessionConfig, backend: str) -> str:
        found = get(config, setting)
        return f"{found} {READ_AS_FLAG}" if is_flag(found) else ""

    return Link(setting, (flag,), group, write, read, note, _shown(default), remark)


def switch(setting: str, flag: str, group: str, *, off: bool = False, remark: str = "") -> Link:
    """A setting that is on with the flag; with `off`, one that is off with it."""

    def write(config: SessionConfig, backend: str) -> Words:
        return [flag] if get(config, setting) is not off else []

    return Link(
        setting,
        (flag,),
        group,
        write,
        lambda given: given.has(flag) is not off,
        default="on" if off else "off",
        remark=remark,
    )


def is_flag(found: object) -> bool:
    """Would the parser take this value for a flag?"""
    return isinstance(found, str) and found.startswith("-")


def _kind_of(setting: str) -> type:
    """int, float or str: what a setting holds beside None."""
    section: Any = SessionConfig
    *sections, last = setting.split(".")
    for part in sections:
        section = section.model_fields[part].annotation
    words = str(section.model_fields[last].annotation)
    if "float" in words:
        return float
    return int if "int" in words else str


def _shown(default: object) -> str:
    return "none" if default is None else str(default)


Flags = dict[str, list[str]]
"""Each flag with its values, in the order of the script."""


T = TypeVar("T")


FSDP, MEGATRON = "fsdp", "megatron"
