"""`Underway`: groups of requests that the engines work on, each handed over when it is finished.

The ordinary rollout is one call per engine and waits for all. Here every group is a call of its
own, so that whoever has enough of them can stop the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kit.errors import StackError

if TYPE_CHECKING:
    from kit.stack.engine import Generation, SamplingSettings
    from kit.stack.stack import Stack

AGAIN = 0.2
"""Seconds until what is left is told to stop again: a request may arrive after the first word."""

Finished = list[tuple[int, list["Generation"]]]
"""(the group's number, one generation a prompt), in the order of the numbers."""


class Underway:
    """Add groups, take those that finished, stop the rest."""

    def __init__(
        self,
        stack: Stack,
        engines: list[Any],
        get: Callable[[list[Any]], list[list[Generation]]],
        sampling: SamplingSettings,
    ) -> None:
        self._stack, self._engines, self._get, self._sampling = stack, engines, get, sampling
        self._calls: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._calls)

    def add(
        self, number: int, prompts: list[list[int]], seeds: list[int], budgets: list[int]
    ) -> None:
        """Send one group to an engine; neighbours in number go to different ones.

        Args:
            number: the group's own, under which it is handed over.
            prompts: token ids, continued responses included.
            seeds: one a prompt.
            budgets: the most new tokens of each prompt.
        """
        engine = self._engines[number % len(self._engines)]
        call = engine.generate.remote(prompts, self._sampling, seeds, budgets)
        self._calls[call] = number

    def finished(self) -> Finished:
        """Wait until a group is finished; it, and all others that are by then.

        Raises:
            StackError: an engine failed, or nothing finished within `engine.call_timeout`.
        """
        limit = self._stack.config.engine.call_timeout
        done = self._take(1, limit) if self._calls else []
        if self._calls and not done:
            raise StackError(
                f"None of {len(self._calls)} groups of responses finished within {limit:.0f} s.",
                why=self._stack.cluster.log_tail(),
                fix="raise engine.call_timeout, or lower rollout.over_sampling_batch_size.",
            )
        return sorted(done + self._take(len(self._calls), 0.0))

    def stop(self) -> Finished:
        """Abort what is left; each request returns the tokens it has."""
        done: Finished = []
        while self._calls:
            self._stack.abort()
            done += self._take(len(self._calls), AGAIN)
        return sorted(done)

    def _take(self, least: int, seconds: float) -> Finished:
        import ray

        if not self._calls:
            return []
        ready, _ = ray.wait(list(self._calls), num_returns=least, timeout=seconds)
        return [
            (self._calls.pop(call), answer)
            for call, answer in zip(ready, self._get(ready), strict=True)
        ]
