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
        samples = sample if isinstance(sample, list) else [sample]
        grades = [grade(name, each.response, each.label, each.metadata) for each in samples]
        return grades if isinstance(sample, list) else grades[0]

    return reward


exact = _reward("exact")
number = _reward("number")
math = _reward("math")
gsm8k = _reward("gsm8k")
format = _reward("format")
reasoning_gym = _reward("reasoning_gym")
