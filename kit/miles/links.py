"""`Link`: a setting of the kit and the flags of Miles that mean the same, to write and to read.

`Given` holds the flags of a launch script, which are read one by one with Miles' defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from kit.config import SessionConfig
from kit.errors import ConfigError

CKPT, LORA, ROLLOUT, EVAL, GRPO = "CKPT", "LORA", "ROLLOUT", "EVAL", "GRPO"
OPTIMIZER, PERF, SGLANG, LOG = "OPTIMIZER", "PERF", "SGLANG", "LOG"
GROUPS = (CKPT, LORA, ROLLOUT, EVAL, GRPO, OPTIMIZER, PERF, SGLANG, LOG)
"""Arrays of the script, in its order."""
FSDP, MEGATRON = "fsdp", "megatron"

T = TypeVar("T")
Flags = dict[str, list[str]]
"""Each flag with its values, in the order of the script."""
Words = list[str]
Write = Callable[[SessionConfig, str], Words]
"""The flags for a configuration and a backend, not quoted for the shell yet."""


@dataclass(slots=True)
class Given:
    """The flags of a script, with the remarks that reading them as settings produced."""

    flags: Mapping[str, Sequence[str]]
    remarks: list[str] = field(default_factory=list)
    """What is not carried over as it is."""

    @property
    def backend(self) -> str:
        """Miles' trainer: `megatron`, its default, or `fsdp`."""
        return self.text("--train-backend", MEGATRON)

    def has(self, flag: str) -> bool:
        """Whether a flag was given."""
        return flag in self.flags

    def all(self, flag: str) -> list[str]:
        """Values of a flag; empty if it was not given."""
        return list(self.flags.get(flag, ()))

    def text(self, flag: str, default: T) -> str | T:
        """The one value of a flag, or the default."""
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
        """The one value of a flag as an integer, or the default."""
        return self._number(flag, default, int)

    def number(self, flag: str, default: T) -> float | T:
        """The one value of a flag as a number, or the default."""
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
    """A word that the shell expands: `$MODEL`."""


def words_if(wanted: object, *words: object) -> Words:
    """The words of a script where something is wanted; none where it is not."""
    return [word if isinstance(word, str) else str(word) for word in words] if wanted else []


@dataclass(frozen=True, slots=True)
class Link:
    """How one setting is written as flags and read back; exact unless `note` says otherwise."""

    setting: str
    flags: tuple[str, ...]
    """The flags that express it, the main one first."""
    group: str
    """The array of the script that they belong to."""
    write: Write
    read: Read
    note: Note = lambda config, backend: ""
    """Why a value is not carried over as it is; "" if it is."""
    default: str = ""
    """What Miles does without the flag, in words."""
    remark: str = ""
    """For the table: what to know beside the names."""


READ_AS_FLAG = "would be read as a flag, and is left out"


def get(config: SessionConfig, setting: str) -> Any:
    """Value of a setting by its dotted name."""
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
    """Link of a setting with one value and one flag.

    Args:
        setting: its dotted name.
        flag: the flag of Miles.
        group: the array of the script that the flag goes to.
        default: Miles' default; None where it has none.
        explicit: write the flag also for the default value.
        absent: the setting's value that means Miles' default, if it is not `default` itself.
        remark: a note for the table.
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

    shown = "none" if default is None else str(default)
    return Link(setting, (flag,), group, write, read, note, shown, remark)


def switch(setting: str, flag: str, group: str, *, off: bool = False) -> Link:
    """Link of a boolean setting: true with the flag; with `off`, false with it."""
    return Link(
        setting,
        (flag,),
        group,
        lambda config, backend: words_if(get(config, setting) is not off, flag),
        lambda given: given.has(flag) is not off,
        default="on" if off else "off",
    )


def is_flag(found: object) -> bool:
    """Whether Miles' parser would take this value for a flag."""
    return isinstance(found, str) and found.startswith("-")


def _kind_of(setting: str) -> type:
    """Type of a setting beside None: int, float or str."""
    section: Any = SessionConfig
    *sections, last = setting.split(".")
    for part in sections:
        section = section.model_fields[part].annotation
    words = str(section.model_fields[last].annotation)
    if "float" in words:
        return float
    return int if "int" in words else str
