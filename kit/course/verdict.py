"""`check`: takes an answer and returns a verdict that shows itself under the cell."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal, TypeAlias

from kit.errors import DataError, did_you_mean

Check: TypeAlias = Callable[..., str]
"""Takes an answer, and by name what it is compared with; returns what is wrong, or nothing."""
State = Literal["open", "wrong", "right"]

LESSONS = ("01", "02", "03", "04", "05", "06", "07", "08", "09", "13", "14")
_HEADS = {"open": "○ not answered yet", "wrong": "✗ not yet", "right": "✓ right"}
_KINDS = {"open": "warn", "wrong": "bad", "right": "good"}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict on an answer: open, wrong or right, and why."""

    exercise: str
    state: State
    words: str = ""
    """What is wrong with it, or what to do."""

    @property
    def plain(self) -> str:
        """`Exercise 01.1: ✗ not yet. That is 0.875, ...`."""
        return f"Exercise {self.exercise}: {_HEADS[self.state]}. {self.words}".rstrip()

    def __str__(self) -> str:
        return self.plain

    def _repr_mimebundle_(self, **_: Any) -> dict[str, str]:
        from kit.utils.display import bundle
        from kit.viz.html import badge, page, tag

        line = tag(
            "div",
            f"Exercise {self.exercise} ",
            badge(_HEADS[self.state], _KINDS[self.state]),
            f" {self.words}",
        )
        return bundle(page(line), self.plain)


def check(exercise: str, answer: object, **known: object) -> Verdict:
    """Compare an answer with the right one; the verdict on a wrong answer names the likely mistake.

    Args:
        exercise: its number, such as `01.2`.
        answer: a value or, where the exercise asks for one, a function; `...` is no answer yet.
        known: what the exercise's cell passes on from the notebook, such as `rollout=rollout`.

    Raises:
        DataError: there is no such exercise, or its cell was changed so that it passes other
            things. An answer, whatever it is, raises nothing.
    """
    checks = exercises()
    if exercise not in checks:
        raise DataError(f"There is no exercise {exercise!r}.", fix=did_you_mean(exercise, checks))
    wanted = set(list(inspect.signature(checks[exercise]).parameters)[1:])
    if wanted != set(known):
        passed = ", ".join([repr(exercise), "answer", *(f"{n}={n}" for n in sorted(wanted))])
        raise DataError(
            f"Exercise {exercise} is checked with {sorted(wanted)}, not with {sorted(known)}.",
            fix=f"end the cell with check({passed}).",
        )
    if _unanswered(answer):
        return _open(exercise)
    try:
        wrong = checks[exercise](answer, **known)
    except NotAnsweredError:
        return _open(exercise)
    except Exception as error:  # an answer can be anything, and its code can do anything
        doing = "Calling the function" if callable(answer) else "Looking at the answer"
        wrong = f"{doing} raised {type(error).__name__}: {error}."
    return Verdict(exercise, "wrong" if wrong else "right", wrong)


def exercises() -> dict[str, Check]:
    """Every exercise by its number; the docstring of its check is the right answer in words."""
    modules = {lesson: import_module(f"kit.course.lesson_{lesson}") for lesson in LESSONS}
    return {
        f"{lesson}.{number}": function
        for lesson, module in modules.items()
        for number, function in enumerate(module.EXERCISES, start=1)
    }


class NotAnsweredError(Exception):
    """An answer's function returned `...`: its stub was not filled in."""


def call(function: object, *arguments: object) -> Any:
    """Call an answer's function. Raises NotAnsweredError if it is still a stub."""
    if not callable(function):
        raise TypeError(f"a function is asked for, not {function!r}")
    value = function(*arguments)
    if value is ...:
        raise NotAnsweredError
    return value


def near(value: Any, right: float, tolerance: float = 0.01) -> bool:
    """Whether a value is a number, of Python's or another library, and nearly equals `right`."""
    return hasattr(value, "__float__") and abs(float(value) - right) <= tolerance


def hint(
    answer: object, right: float, mistakes: Mapping[str, float], tolerance: float = 0.01
) -> str:
    """Return "" for a right number, else the hints for the mistakes that would lead to it."""
    if isinstance(answer, bool) or not hasattr(answer, "__float__"):
        return f"A number is asked for, not {answer!r}."
    value = float(answer)
    if near(value, right, tolerance):
        return ""
    if math.isnan(value):
        return "That is nan, not a number: was something divided by 0?"
    hints = [words for words, mistaken in mistakes.items() if near(value, mistaken, tolerance)]
    return " Or: ".join(hints) or f"{value:.4g} is too {'large' if value > right else 'small'}."


def _unanswered(answer: object) -> bool:
    """Whether an answer is still the stub: three dots, or a list or dictionary of them."""
    parts = answer.values() if isinstance(answer, dict) else answer
    if isinstance(parts, (list, tuple)) or isinstance(answer, dict):
        return all(part is ... for part in parts)  # type: ignore[attr-defined]
    return answer is ...


def _open(exercise: str) -> Verdict:
    return Verdict(
        exercise, "open", "Put your answer in place of the three dots, and run the cell."
    )
