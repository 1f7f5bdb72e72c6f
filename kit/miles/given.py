"""`Given`: the flags of a launch script, asked for one by one, with Miles' defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from kit.errors import ConfigError

Flags = dict[str, list[str]]
"""Each flag with its values, in the order of the script."""
T = TypeVar("T")

FSDP, MEGATRON = "fsdp", "megatron"


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
