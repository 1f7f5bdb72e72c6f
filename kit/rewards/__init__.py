"""Rewards: verifiers that grade a response, and the runner that turns failures into data.

    registry.py         the built-in rewards by name: grade, check, build
    verifiers.py        graders that look at the text alone: exact, number, gsm8k, format
    runner.py           score_samples: any reward over any samples, one failure at a time; Scoring:
                        scores samples while others are still being generated
    timeouts.py         the time limit of a reward function
    grader_process.py   a helper process for graders that compute with what a model wrote
    grader_worker.py    what runs in that process

A reward is a built-in's name, a mapping of weights, or plain Python run in the caller's process:

    def short_and_right(sample):            # one Sample, one number
        return float(sample.response.strip() == sample.label) - 0.01 * sample.response_length

    def relative_length(samples):           # a parameter named `samples`: all at once
        longest = max(len(s.response) for s in samples) or 1
        return [1 - len(s.response) / longest for s in samples]

Importing this package is light; math-verify and reasoning-gym load when they first grade.
"""

from __future__ import annotations

from kit.rewards.registry import BUILT_IN, BuiltIn, build, check, grade
from kit.rewards.runner import Reward, failure_summary, score_samples

__all__ = [
    "BUILT_IN",
    "BuiltIn",
    "Reward",
    "build",
    "check",
    "failure_summary",
    "grade",
    "score_samples",
]
