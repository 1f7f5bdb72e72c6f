"""`Inputs`: what was passed to `start` as objects, which no file of a session can hold.

Names, paths and weights of built-in rewards are kept and taken again. Of a function its name and a
checksum of its source are kept, so that whoever continues the session is asked for it, and not
given the configuration's instead.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from kit.errors import KitError

WORDS = {
    "data": "training prompts",
    "eval_data": "held-out prompts",
    "reward": "a reward function",
    "advantage": "an advantage function",
    "loss": "a loss function",
}
"""What can be passed, in words."""
OBJECT = "object"


@dataclass(frozen=True, slots=True)
class Inputs:
    """Objects that a session was started with, by the name of their argument.

    A value that JSON can hold is kept as it is; another as `{"object": name, "source": checksum}`.
    """

    described: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, **given: Any) -> Self:
        """Describe arguments of `start`; those that are None were not passed."""
        return cls({name: _describe(value) for name, value in given.items() if value is not None})

    @classmethod
    def of_state(cls, row: Mapping[str, Any]) -> Self:
        """Read what a checkpoint or a journal says of them."""
        described = row.get("inputs", {})
        for name, was in row.get("passed", {}).items():  # as version 0.1 wrote it
            if was:
                described = {**described, name: was if isinstance(was, str) else {OBJECT: ""}}
        return cls(described)

    def again(
        self, given: Mapping[str, Any], error: type[KitError], whose: str, call: str
    ) -> dict[str, Any]:
        """Arguments to continue with: those that are given now, and what could be kept.

        Args:
            given: by name; None where nothing is passed.
            error: what is raised.
            whose: the session or checkpoint, in words.
            call: the call that continues, with `...` where the arguments go.

        Raises:
            KitError: of the kind `error`; an object has to be passed again.
        """
        missing = {name: told for name, told in self.described.items() if given.get(name) is None}
        lost = {n: missing[n] for n in WORDS if n in missing and not _is_kept(missing[n])}
        if lost:
            raise error(
                f"{whose} was started with {_in_words(lost)} of its own.",
                why="An object goes with its kernel, and no file holds it. Without it the session "
                "would go on with what the configuration says instead.",
                fix="make it again and pass it: "
                f"`{call.replace('...', ', '.join(f'{name}=...' for name in lost))}`.",
            )
        return dict(given) | missing

    def missing_in(self, other: Inputs) -> str:
        """What these were and the other ones are not, in words; empty where nothing is missing."""
        return _in_words({n: t for n, t in self.described.items() if n not in other.described})


def _describe(value: Any) -> Any:
    if isinstance(value, (str, Path)):
        return str(value)
    if isinstance(value, Mapping):
        return {str(name): _describe(each) for name, each in value.items()}
    if isinstance(value, (int, float)):
        return value
    if callable(value):
        return {OBJECT: name_of(value), "source": _checksum(value)}
    return {OBJECT: type(value).__name__, "source": None}


def _is_kept(told: Any) -> bool:
    """Whether a description is the value itself."""
    if isinstance(told, dict):
        return OBJECT not in told and all(map(_is_kept, told.values()))
    return True


def _in_words(described: Mapping[str, Any]) -> str:
    named = (WORDS[name] + _named(described[name]) for name in WORDS if name in described)
    return " and ".join(named)


def _named(told: Any) -> str:
    """Name of a function, in brackets; empty where a name says nothing."""
    name = str(told.get(OBJECT, "")) if isinstance(told, dict) else ""
    return f" ({name})" if name.isidentifier() else ""


def name_of(function: Callable[..., Any]) -> str:
    """Name of a function or of a callable object, as a person wrote it."""
    while isinstance(function, partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))


def _checksum(function: Callable[..., Any]) -> str | None:
    """Checksum of a function's source; None where there is none to read."""
    while isinstance(function, partial):
        function = function.func
    written = inspect.unwrap(function)
    try:
        source = inspect.getsource(written if inspect.isroutine(written) else type(written))
    except (OSError, TypeError):
        return None
    return hashlib.sha256(source.encode("utf-8", "replace")).hexdigest()[:16]
