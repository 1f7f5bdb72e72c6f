"""What the engines work on, handed over as it is finished.

`Parts` is the ordinary rollout: one call an engine. With `Underway` every group is a call of its
own, so that whoever has enough of them can stop the rest; that costs the engines some time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from kit.errors import StackError

if TYPE_CHECKING:
    from kit.stack.engine import Generation, SamplingSettings
    from kit.stack.stack import Stack

AGAIN = 0.2
"""Seconds until what is left is told to stop again: a request may arrive after the first word."""

Finished = list[tuple[int, list["Generation"]]]
"""(the group's number, one generation a prompt), in the order of the numbers."""


class Parts:
    """The responses of one rollout, in the parts in which the engines finish them.

    One call an engine. Whoever iterates has the time between two parts to himself: the engines do
    not wait for it. Iterating again goes on, with the part that an exception came upon once more.
    """

    def __init__(
        self,
        stack: Stack,
        calls: dict[Any, int],
        get: Callable[[Any], Any],
        measure: Callable[[], None],
        *,
        at_once: bool,
    ) -> None:
        """Takes the calls, each with the number of its first prompt, and what to do at the end."""
        self._stack, self._calls, self._get, self._at_once = stack, calls, get, at_once
        self._measure = measure
        self._begin = time.perf_counter()
        self._stopped = False
        self._fetched: tuple[Any, Any] | None = None
        """The part that is being handed over, so that an interrupt cannot lose it."""
        self.seconds = 0.0
        """From the call until the last of the responses handed over was written, however late it
        was fetched."""

    @property
    def left(self) -> bool:
        """Are there parts that nobody has taken?"""
        return bool(self._calls)

    def __iter__(self) -> Iterator[list[tuple[int, Generation]]]:
        """(a prompt's number, its response), as many as are finished.

        Raises:
            StackError: an engine failed, or nothing was finished within `engine.call_timeout`.
        """
        if self._calls:
            yield from self._parts()
            self._measure()

    def _parts(self) -> Iterator[list[tuple[int, Generation]]]:
        if self._at_once:
            self._until_stopped(len(self._calls))
            answers = self._get(list(self._calls))
            self.seconds = self.seconds or time.perf_counter() - self._begin
            yield [
                (first + place, generation)
                for first, answer in zip(self._calls.values(), answers, strict=True)
                for place, generation in enumerate(answer)
            ]
            self._calls.clear()
        while self._calls:
            call, answer = self._fetched = self._fetched or self._next()
            if answer is not None:
                seconds, finished = self._get(answer)
                self.seconds = max(self.seconds, seconds)
                yield [(self._calls[call] + place, generation) for place, generation in finished]
            else:
                self._calls.pop(call, None)
            self._fetched = None

    def _next(self) -> tuple[Any, Any]:
        """A call and its next answer; None where it has no further one."""
        call = self._ready()
        return call, next(call, None)

    def _ready(self) -> Any:
        """A call that has a part to hand over, or is at its end."""
        import ray

        self._until_stopped(1)
        limit = self._stack.config.engine.call_timeout
        ready, _ = ray.wait(list(self._calls), num_returns=1, timeout=limit)
        if not ready:
            raise StackError(
                f"generate did not finish a response within {limit:.0f} s.",
                why=self._stack.cluster.log_tail(),
                fix="raise engine.call_timeout, or look at what keeps the machine busy.",
            )
        return ready[0]

    def stop(self) -> None:
        """Abort what is not finished: the parts to come have the tokens that there are."""
        self._stopped = True
        self._stack.abort()

    def _until_stopped(self, least: int) -> None:
        """Say again to stop, if that was said: a large call may reach its engine after the word."""
        import ray

        while self._stopped:
            ready, _ = ray.wait(list(self._calls), num_returns=least, timeout=AGAIN)
            if len(ready) >= least:
                return
            self._stack.abort()


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
