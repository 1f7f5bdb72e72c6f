"""What can be shown of a sample's tokens: one drawing for each quantity that is known of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from kit.samples import Sample
from kit.viz.html import Child
from kit.viz.tokens import token_strip


def strips(sample: Sample) -> dict[str, Callable[[], Child]]:
    """The quantities known of this sample's tokens, most telling first, and what draws each."""
    return {"rollout_log_prob": partial(token_strip, sample)}
