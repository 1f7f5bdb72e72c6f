"""What counts as a reward, and how the failure of a reward function is worded.

`to_reward` says what counts as a reward, `failure_message` words a failure in one line, and
`traceback_text` has the whole.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from inspect import unwrap
from numbers import Real
from typing import Any

from kit.errors import KitError

_LONGEST_MESSAGE = 300


class NotARewardError(Exception):
    """A reward function returned something other than a finite number."""


class RemoteFailureError(Exception):
    """A reward function failed in another process, which worded it."""

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.traceback = traceback


@dataclass(frozen=True, slots=True)
class Value:
    """A reward, and its parts by name where it has some."""

    reward: float
    parts: dict[str, float] = field(default_factory=dict)


_TOTALS = ("score", "reward")
"""Keys of a mapping under which the reward itself is."""


def to_value(value: Any) -> Value:
    """Convert to a reward, with the parts of one that is a mapping.

    The reward of a mapping is its `score` or `reward`; its other numbers are the parts. Without
    either it is the sum of the parts. Raises NotARewardError for everything else.
    """
    if isinstance(value, Value):
        return value
    if not isinstance(value, Mapping):
        return Value(to_reward(value))
    total = next((name for name in _TOTALS if name in value), None)
    parts = {}
    for name, part in value.items():
        if name == total or (total is not None and not _is_number(part)):
            continue  # verl's functions also return what they read, as text
        if not isinstance(name, str):
            raise NotARewardError(
                f"the reward function returned {describe(value)} whose key {name!r} is no name"
            )
        try:
            parts[name] = to_reward(part)
        except NotARewardError as error:
            raise NotARewardError(f"in {name!r}: {error}") from None
    if total is not None:
        return Value(to_reward(value[total]), parts)
    if not parts:
        raise NotARewardError("the reward function returned an empty mapping")
    return Value(sum(parts.values()), parts)


def _is_number(value: Any) -> bool:
    scalar = getattr(value, "shape", None) == () and hasattr(value, "item")
    return scalar or isinstance(value, (Real, Decimal))


def to_reward(value: Any) -> float:
    """Convert to a float: numbers, booleans, NumPy and torch scalars.

    Raises NotARewardError for everything else, saying what it was.
    """
    if value is None:
        raise NotARewardError("the reward function returned None: is a `return` missing?")
    # Tensors and arrays are told apart by their shape; a list of one is not a number either.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (Real, Decimal)):
        raise NotARewardError(f"the reward function returned {describe(value)}, not a number")
    try:
        reward = float(value)
    except (OverflowError, ValueError) as error:
        raise NotARewardError(
            f"the reward function returned a number out of range: {error}"
        ) from None
    if not math.isfinite(reward):
        raise NotARewardError(f"the reward function returned {reward}, not a finite number")
    return reward


def describe(value: Any) -> str:
    """Describe a value: `'yes' (str)`, `a list of 3 values`, `a Tensor of shape (2, 1)`."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {kind} of shape {tuple(shape)}"
    if isinstance(value, (list, tuple, set, dict)):
        return f"a {kind} of {len(value)} values"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({kind})"


def failure_message(error: BaseException, function: Callable[..., Any]) -> str:
    """Say in one line what was raised, and in which line of the reward function.

    Lines are counted from the function's own first line, as a cell counts them that begins with
    the function.
    """
    if isinstance(error, (NotARewardError, RemoteFailureError)):
        return str(error)
    if isinstance(error, KitError):
        return f"{type(error).__name__}: {error.what}" + (f" {error.fix}" if error.fix else "")
    words = " ".join(str(error).split())
    message = f"{type(error).__name__}: {words}" if words else type(error).__name__
    if len(message) > _LONGEST_MESSAGE:
        message = message[: _LONGEST_MESSAGE - 3] + "..."
    line = _line(error, function)
    return f"{message} (line {line} of reward function)" if line else message


def traceback_text(error: BaseException | None, function: Callable[..., Any] | None) -> str:
    """Traceback of an exception, from the reward function's own frame on.

    Empty where the function returned a value that is no number, and raised nothing.
    """
    if error is None or isinstance(error, NotARewardError):
        return ""
    if isinstance(error, RemoteFailureError):
        return error.traceback
    code = getattr(code_owner(function), "__code__", None) if function else None
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace or error.__traceback__)
    return "".join(lines).rstrip()


def code_owner(function: Callable[..., Any]) -> Callable[..., Any]:
    """The plain function behind partials, decorators and callable objects."""
    while isinstance(function, partial):
        function = function.func
    function = unwrap(function)
    if hasattr(function, "__code__") or hasattr(function, "__func__"):
        return function
    call: Callable[..., Any] = unwrap(type(function).__call__)
    return call


def function_name(function: Any) -> str:
    """Name of a function, of its class, or `a lambda`."""
    name = getattr(function, "__name__", None) or getattr(code_owner(function), "__name__", "")
    if not name or name == "__call__":
        return type(function).__name__
    return "a lambda" if name == "<lambda>" else str(name)


def _line(error: BaseException, function: Callable[..., Any]) -> int | None:
    code = getattr(code_owner(function), "__code__", None)
    line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code is code:
            line = number - frame.f_code.co_firstlineno + 1
    return line
