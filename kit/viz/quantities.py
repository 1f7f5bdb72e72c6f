"""What can be shown of a sample's tokens: one drawing for each quantity that is known of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kit import token_values
from kit.samples import Sample
from kit.viz.html import Child
from kit.viz.strips import strip


def strips(sample: Sample) -> dict[str, Callable[[], Child]]:
    """The quantities known of this sample's tokens, most telling first, and what draws each."""
    return {name: partial(_draw, sample, name) for name in token_values.known(sample)}


def _draw(sample: Sample, name: str) -> Child:
    values = token_values.require(sample, name)
    return strip(sample, token_values.quantity(name, values), values)
