"""Numbers into classes of colour: what each class spans, and which one a number falls into.

Amounts and log-probabilities have five classes, from plain to strong. Numbers with a sign have
seven: three to either side of what counts as nothing, told apart by colour and by which edge of the
token is drawn thick, the upper for more and the lower for less.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from kit.samples.token_values import LARGEST_LOG_RATIO, Quantity, ratio
from kit.utils.formatting import number

BINS = ((0.9, "over 90%"), (0.5, "50–90%"), (0.1, "10–50%"), (0.01, "1–10%"), (0.0, "under 1%"))
"""Probability classes of a token, sure to surprising: the lower end of each, and its words."""
ENTROPIES = (0.05, 0.5, 1.0, 2.0)
"""Upper ends in nats: decided, nearly, between two, between several, between many."""
SHARES = (0.1, 0.5, 1.0)
"""Where the classes of a number with a sign begin, as shares of the size that one token in twenty
reaches."""
UNKNOWN = "q"
"""The style of a token whose number is not a number."""


@dataclass(frozen=True, slots=True)
class Scale:
    """The classes of one quantity."""

    styles: tuple[str, ...]
    """Style of each class; empty for the plain one."""
    words: tuple[str, ...]
    """What each class spans."""
    place: Callable[[float], int]
    """Which class a number falls into; not asked of NaN."""
    size: Callable[[float], float]
    """How far a number stands out: the token where it is largest gets the caret."""

    def style(self, value: float) -> str:
        """The style of a number's class."""
        return UNKNOWN if math.isnan(value) else self.styles[self.place(value)]

    def counts(self, values: Sequence[float]) -> list[int]:
        """Count of numbers in each class."""
        counts = [0] * len(self.styles)
        for value in values:
            if not math.isnan(value):
                counts[self.place(value)] += 1
        return counts

    def stands_out(self, values: Sequence[float]) -> int | None:
        """Position of the number that stands out most; None where all are alike or none is one."""
        places = [i for i, value in enumerate(values) if not math.isnan(value)]
        sizes = [self.size(values[i]) for i in places]
        if not places or min(sizes) == max(sizes):
            return None
        return places[sizes.index(max(sizes))]


def scale_of(quantity: Quantity, values: Sequence[float]) -> Scale:
    """The classes of a quantity; those of numbers with a sign fit themselves to the numbers."""
    if quantity.kind == "log_prob":
        return _probabilities()
    if quantity.kind == "category":
        return _names(values)
    if quantity.kind == "amount":
        return _amounts(quantity, values)
    if quantity.kind == "ratio":
        logs = [_log(value) for value in values]
        return _signed(quantity, logs, _log, lambda x: f"× {number(ratio(x), 3)}")
    return _signed(quantity, values, float, lambda x: f"{x:+.2g}")


def surprise(log_prob: float) -> int:
    """The class of a log-probability in `BINS`: 0 is sure, 4 surprising."""
    probability = math.exp(min(log_prob, 0.0))
    return next(i for i, (low, _) in enumerate(BINS) if probability >= low)


def _probabilities() -> Scale:
    words = tuple(words for _, words in BINS)
    return Scale(("", "p1", "p2", "p3", "p4"), words, surprise, lambda x: -x)


def _amounts(quantity: Quantity, values: Sequence[float]) -> Scale:
    edges: Sequence[float] = ENTROPIES
    if quantity.name != "entropy":
        largest = max((v for v in values if math.isfinite(v)), default=0.0) or 1.0
        edges = [largest * share for share in (0.05, 0.25, 0.5, 0.75)]
    ends = [number(edge, 2) for edge in edges]
    between = [f"{low} to {high}" for low, high in pairwise(ends)]
    words = (f"under {ends[0]}", *between, f"{ends[-1]} or more")
    return Scale(("", "p1", "p2", "p3", "p4"), words, lambda x: bisect_right(edges, x), float)


NAMED = ("", "p1", "p2", "p3", "p4", "u1", "u2", "u3", "d1", "d2", "d3")
"""The styles of numbers that are names; all there are, since none is more than another."""


def _names(values: Sequence[float]) -> Scale:
    """A class for each number, or for neighbours where there are more than styles."""
    most = int(max((v for v in values if math.isfinite(v)), default=0.0))
    width = most // len(NAMED) + 1
    firsts = range(0, most + 1, width)
    ends = [(n, min(n + width - 1, most)) for n in firsts]
    words = [f"number {a}" if a == b else f"numbers {a}–{b}" for a, b in ends]
    styles = NAMED[: len(words)]
    return Scale(styles, tuple(words), lambda x: int(x) // width, lambda _: 0.0)


def _signed(
    quantity: Quantity,
    values: Sequence[float],
    of: Callable[[float], float],
    say: Callable[[float], str],
) -> Scale:
    """Classes around 0, of `of(number)`; `values` are such already."""
    sizes = sorted(abs(v) for v in values if math.isfinite(v) and v)
    usual = sizes[math.ceil(0.95 * len(sizes)) - 1] if sizes else 0.0
    usual = max(usual, quantity.least) or 1.0
    edges = [usual * share for share in SHARES]

    def place(value: float) -> int:
        x = of(value)
        level = bisect_right(edges, abs(x))
        return 3 + level if x > 0 else 3 - level

    def spans(sign: int) -> list[str]:
        ends = [say(sign * edge) for edge in edges]
        out = "▲" if sign > 0 else "▼"
        last = f"{out} {ends[2]} or {'more' if sign > 0 else 'less'}"
        return [f"{out} {ends[0]} to {ends[1]}", f"{out} {ends[1]} to {ends[2]}", last]

    nothing = f"between {say(-edges[0])} and {say(edges[0])}"
    return Scale(
        ("d3", "d2", "d1", "", "u1", "u2", "u3"),
        (*reversed(spans(-1)), nothing, *spans(1)),
        place,
        lambda value: abs(of(value)),
    )


def _log(value: float) -> float:
    if math.isnan(value):
        return value
    return math.log(value) if value > 0 else -LARGEST_LOG_RATIO
