"""What the engines work on, handed over as it is finished.

`Parts` is the ordinary rollout: one call an engine. With `Underway` every group is a call of its
own, so that whoever has enough of them can stop the rest; that costs the engines some time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from kit.errors import StackError
from kit.stack.calls import EngineDiedError

if TYPE_CHECKING:
    from kit.messages import Generation, SamplingSettings
    from kit.stack.stack import Stack


AGAIN = 0.2
"""Seconds until what is left is told to stop again: a request may arrive after the first word."""


DEATHS = 2
"""So often what a dead engine was asked is asked again."""


Request = tuple[list[list[int]], list[int], list[int]]
"""(prompts, seeds, budgets) of a group."""


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
        ask: Callable[[list[int]], dict[Any, list[int]]],
        count: int,
        *,
        at_once: bool,
    ) -> None:
        """Asks for all of `count` prompts; `ask` sends some, by number, in one call an engine."""
        self._stack, self._ask, self._at_once = stack, ask, at_once
        self._get = partial(stack.calls.get, doing="generate")
        self._calls = ask(list(range(count)))
        self._unanswered = set(range(count))
        self._deaths = 0
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
        while self._calls:
            yield from self._parts()
            if self._unanswered and not self._stopped:
                self._stack.engine_in_order()  # one has died; it is there again
                self._calls = self._ask(sorted(self._unanswered))
            if not self._calls:
                self._stack._measure("generate")

    def _parts(self) -> Iterator[list[tuple[int, Generation]]]:
        if self._at_once:
            self._until_stopped(len(self._calls))
            finished: list[tuple[int, Generation]] = []
            for call, places in self._calls.items():
                with self._may_die():
                    finished += zip(places, self._get(call), strict=True)
            self.seconds = self.seconds or time.perf_counter() - self._begin
            yield finished
            self._unanswered -= {place for place, _ in finished}
            self._calls.clear()
        while self._calls:
            call, answer = self._fetched = self._fetched or self._next()
            if answer is not None:
                places, answered = self._calls[call], False
                with self._may_die():
                    seconds, answers = self._get(answer)
                    answered = True
                if not answered:
                    del self._calls[call]
                    self._fetched = None
                    continue
                self.seconds = max(self.seconds, seconds)
                finished = [(places[number], generation) for number, generation in answers]
                yield finished
                self._unanswered -= {place for place, _ in finished}
            else:
                self._calls.pop(call, None)
            self._fetched = None

    @contextmanager
    def _may_die(self) -> Iterator[None]:
        """What a dead engine was asked is asked again, unless that has been done before."""
        try:
            yield
        except EngineDiedError:
            self._deaths += 1
            if self._deaths > DEATHS:
                raise

    def _next(self) -> tuple[Any, Any]:
        """A call and its next answer; None where it has no further one."""
        call = self._ready()
        return call, next(call, None)

    def _ready(self) -> Any:
        """A call that has a part to hand over, or is at its end."""
        self._until_stopped(1)
        limit = self._stack.config.engine.call_timeout
        ready = self._stack.calls.wait(list(self._calls), 1, "generate", limit)
        if not ready:
            raise self._stack.calls.late("generate did not finish a response", limit)
        return ready[0]

    def stop(self) -> None:
        """Abort what is not finished: the parts to come have the tokens that there are."""
        self._stopped = True
        self._stack.abort()

    def _until_stopped(self, least: int) -> None:
        """Say again to stop, if that was said: a large call may reach its engine after the word."""
        while self._stopped:
            ready = self._stack.calls.wait(list(self._calls), least, "generate", AGAIN)
            if len(ready) >= least:
                return
            self._stack.abort()


class Underway:
    """Add groups, take those that finished, stop the rest."""

    def __init__(
        self,
        stack: Stack,
        engines: list[Any],
        sampling: SamplingSettings,
    ) -> None:
        self._stack, self._engines, self._sampling = stack, engines, sampling
        self._calls: dict[Any, tuple[int, Request]] = {}
        self._deaths = 0
        self._stopped = False

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
        self._calls[call] = number, (prompts, seeds, budgets)

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
        self._stopped = True
        done: Finished = []
        while self._calls:
            self._stack.abort()
            done += self._take(len(self._calls), AGAIN)
        return sorted(done)

    def _take(self, least: int, seconds: float) -> Finished:
        if not self._calls:
            return []
        calls = self._stack.calls
        done, again = [], []
        for call in calls.wait(list(self._calls), least, "generate", seconds):
            number, request = self._calls.pop(call)
            try:
                done.append((number, calls.get(call, "generate")))
            except EngineDiedError:
                if self._deaths >= DEATHS:
                    raise
                again.append((number, request))
        if again and not self._stopped:
            self._deaths += 1
            self._stack.engine_in_order()
            for number, request in again:
                self.add(number, *request)
        return done
