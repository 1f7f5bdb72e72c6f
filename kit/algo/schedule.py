"""The learning rate over a run."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate(
    step: int, *, peak: float, lowest: float, warmup: int, total: int, schedule: Schedule
) -> float:
    """Learning rate of one optimizer step.

    It rises linearly over `warmup` steps to `peak`, then stays there (constant) or falls to
    `lowest` at step `total` (linear, or half a cosine wave), and stays at `lowest` after that.

    Args:
        step: optimizer steps done before this one, from 0.
        peak: the highest rate.
        lowest: where linear and cosine end.
        warmup: steps of the rise; 0 starts at the peak.
        total: steps of the whole run.
        schedule: the shape after the rise.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    share = 1.0 - progress if schedule == "linear" else (1.0 + math.cos(math.pi * progress)) / 2
    return lowest + (peak - lowest) * share
