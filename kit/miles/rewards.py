"""The kit's built-in rewards as Miles calls them: `--custom-rm-path kit.miles.rewards.gsm8k`.

The kit has to be installed where Miles runs; nothing of its stack is loaded.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from kit.rewards import grade

Graded = float | list[float]
RewardFunction = Callable[..., Awaitable[Graded]]


def _reward(name: str) -> RewardFunction:
    async def reward(args: Any, sample: Any, **_: Any) -> Graded:
        """Grade one sample, or a list of them; Miles calls it with either."""
        if isinstance(sample, list):
            return [_graded(one) for one in sample]
        return _graded(sample)

    def _graded(sample: Any) -> float:
        return grade(name, sample.response, sample.label, sample.metadata)

    return reward


exact = _reward("exact")
number = _reward("number")
math = _reward("math")
gsm8k = _reward("gsm8k")
format = _reward("format")
reasoning_gym = _reward("reasoning_gym")
