"""`QuantizationReport`: what quantising a model's linear layers does to their weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from kit.utils.display import Shown


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """One weight, and what its codes and scales stand for instead."""

    name: str
    """In the model's files."""
    layer: int
    part: str
    """Its projection, such as `q_proj`."""
    numbers: int
    error: float
    """Root mean square of what rounding changes, as a share of the weight's own."""
    half: float
    """Half of its numbers change by no more than this, in root mean squares of the weight."""
    most: float
    """And 99% of them by no more than this."""
    largest: float
    """And none by more than this."""
    lost: float
    """Share of its numbers that become 0 and were not."""


@dataclass(frozen=True, slots=True)
class QuantizationReport(Shown):
    """Every quantised weight of a model."""

    model: str
    how: str
    """The quantisation in words."""
    weights: tuple[QuantizedWeight, ...] = field(repr=False)

    @property
    def error(self) -> float:
        """Root mean square of the weights' errors, each counted by its numbers."""
        numbers = sum(weight.numbers for weight in self.weights)
        return math.sqrt(sum(w.numbers * w.error**2 for w in self.weights) / numbers)

    @property
    def worst(self) -> tuple[QuantizedWeight, ...]:
        """The weights with the largest errors, at most five."""
        return tuple(sorted(self.weights, key=lambda weight: -weight.error)[:5])

    @property
    def parts(self) -> tuple[str, ...]:
        """The projections, in the order in which a layer has them."""
        return tuple(dict.fromkeys(weight.part for weight in self.weights))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers."""
        return tuple(sorted({weight.layer for weight in self.weights}))

    def of(self, layer: int, part: str) -> QuantizedWeight | None:
        """A layer's weight of this projection; None where there is none."""
        found = (w for w in self.weights if (w.layer, w.part) == (layer, part))
        return next(found, None)
