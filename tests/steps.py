"""What steps did, in a form in which two runs can be compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kit.reports import StepReport


def responses_and_metrics(steps: Sequence[StepReport]) -> tuple[list[Any], list[dict[str, float]]]:
    """Every response with its log-probs, and every metric but the times."""
    responses = [[(s.response, s.rollout_log_probs) for s in step.rollout] for step in steps]
    metrics = [
        {k: v for k, v in step.metrics.items() if not k.startswith("perf/")} for step in steps
    ]
    return responses, metrics
