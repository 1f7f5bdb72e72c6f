"""Which samples of a rollout are listed, and in which order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kit.marks import Mark
from kit.samples import Sample, Status

ANY_MARK, NO_MARK = "any mark or note", "neither"
AS_GENERATED = "as generated"
Numbers = Mapping[str, Sequence[float | None]]
"""Numbers to sort by, one a sample; None where a sample has none."""


@dataclass(frozen=True, slots=True)
class SampleFilter:
    """What a sample must be like to be listed. Bounds are included; None bounds nothing."""

    reward_from: float | None = None
    reward_to: float | None = None
    length_from: float | None = None
    """Response tokens."""
    length_to: float | None = None
    status: Status | None = None
    text: str = ""
    """In prompt, response, right answer or error; capitals do not matter."""
    mark: str | None = None
    """A label, `ANY_MARK` or `NO_MARK`."""

    def keeps(self, sample: Sample, mark: Mark | None) -> bool:
        """Is this sample listed? Without a reward it is within no bounds of rewards."""
        return (
            _within(sample.reward, self.reward_from, self.reward_to)
            and _within(sample.response_length, self.length_from, self.length_to)
            and self.status in (None, sample.status)
            and self._marked(mark)
            and self._says(sample)
        )

    def _marked(self, mark: Mark | None) -> bool:
        if self.mark is None:
            return True
        if self.mark in (ANY_MARK, NO_MARK):
            return (mark is not None) == (self.mark == ANY_MARK)
        return mark is not None and mark.label == self.mark

    def _says(self, sample: Sample) -> bool:
        wanted = self.text.casefold()
        fields = (sample.prompt_text, sample.response, sample.label, sample.error)
        return not wanted or any(wanted in (text or "").casefold() for text in fields)


def _within(value: float | None, low: float | None, high: float | None) -> bool:
    if low is None and high is None:
        return True
    if value is None or math.isnan(value):
        return False
    return (low is None or value >= low) and (high is None or value <= high)


def sortable(samples: Sequence[Sample], extra: Numbers) -> dict[str, Sequence[float | None]]:
    """What a list can be sorted by: reward, length, how sure the engine was, and `extra`."""
    return {
        "reward": [sample.reward for sample in samples],
        "length": [sample.response_length for sample in samples],
        "mean log-prob": [_mean(sample.rollout_log_probs or ()) for sample in samples],
        **extra,
    }


def orders(numbers: Numbers) -> list[str]:
    """The names of all orders, for `arranged`."""
    both = ((f"highest {name} first", f"lowest {name} first") for name in numbers)
    return [AS_GENERATED, *(name for pair in both for name in pair)]


def arranged(positions: Sequence[int], order: str, numbers: Numbers) -> list[int]:
    """Positions in this order; those without a number come last, equal ones as generated."""
    if order == AS_GENERATED:
        return sorted(positions)
    direction, name = order.removesuffix(" first").split(" ", 1)
    values, sign = numbers[name], -1.0 if direction == "highest" else 1.0

    def place(position: int) -> tuple[bool, float, int]:
        value = values[position]
        missing = value is None or math.isnan(value)
        return missing, 0.0 if value is None or missing else sign * value, position

    return sorted(positions, key=place)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
