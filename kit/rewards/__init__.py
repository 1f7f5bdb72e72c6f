"""Rewards: verifiers that grade a response, and the runner that turns failures into data.

    registry.py         the built-in rewards by name: grade, check, build
    verifiers.py        graders that look at the text alone: exact, number, gsm8k, format
    signature.py        how a reward is called: with one sample or with all, awaited or not
    runner.py           score_samples: any reward over any samples, one failure at a time; Scoring:
                        scores samples while others are still being generated
    outcomes.py         what counts as a reward, and how a failure is worded
    timeouts.py         the time limit of a reward function
    event_loop.py       the loop and the time limit of async ones
    function_process.py, function_worker.py
                        a process for functions that cannot be limited in the notebook's own
    grader_process.py, grader_worker.py
                        a process for graders that compute with what a model wrote
    helper_process.py   what both are: requests in, lines of JSON out, killed if need be

A reward is a built-in's name, plain Python run in the caller's process, or several of these with
weights, `{"math": 0.9, "short": (short, 0.1)}`; docs/rewards.md has all forms.

    def short_and_right(sample):            # one Sample, one number
        return float(sample.response.strip() == sample.label) - 0.01 * sample.response_length

    def relative_length(samples):           # a parameter named `samples`: all at once
        longest = max(len(s.response) for s in samples) or 1
        return [1 - len(s.response) / longest for s in samples]

Where the prompt ended in a tag such as `<think>`, a function finds it in front of
`sample.response`, and built-in rewards take it into account, too (`Sample.with_opening`).

Importing this package is light; math-verify and reasoning-gym load when they first grade.
"""

from __future__ import annotations

from kit.rewards.registry import BUILT_IN, BuiltIn, build, check, grade
from kit.rewards.runner import failure_summary, score_samples
from kit.rewards.signature import Reward

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
