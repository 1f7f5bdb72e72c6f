"""The engines of a stack: `EngineGroup`, their actors, and `RequestStream`, what they write."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar

from kit.cluster import processes
from kit.cluster.placement import Placement
from kit.messages import NEVER_HANDED
from kit.stack.actors import StackSettings, engine_name, forget_actor, make_engine
from kit.stack.calls import Calls, EngineDiedError
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.messages import Generation, SamplingSettings


class EngineGroup:
    """The actors of all engines: made, watched, called, and replaced when they die."""

    def __init__(self, settings: StackSettings, placement: Placement, calls: Calls) -> None:
        """Make nothing yet; see `create`."""
        self.actors: list[Any] = []
        """Ray's handles; None where an engine died that had no driver."""
        self._settings, self._placement, self._calls = settings, placement, calls
        self._all = range(settings.layout.replicas)

    def create(self) -> None:
        """Make all actors, not started yet."""
        self.actors[:] = [make_engine(self._settings, self._placement, i) for i in self._all]

    def watch(self, indices: Sequence[int]) -> None:
        """Register the processes of engines that have started with the watchdog."""
        limit = self._settings.config.engine.start_timeout
        calls = [self.actors[index].processes.remote() for index in indices]
        for index, pids in zip(indices, self._calls.get(calls, "start", limit), strict=True):
            place = self._settings.layout.engines[index][0]
            members = self._placement.members(self.actors[index], place, pids)
            self._calls.watch.add(processes.engine(index), members)

    def find(self) -> list[int]:
        """Look the actors up by name, in a stack that lives; which of them are ready."""
        import ray

        self.actors[:] = [None] * len(self._all)
        for index in self._all:
            with suppress(ValueError):  # it died; the next sync starts another
                actor = ray.get_actor(engine_name(index))
                if self._calls.is_ready(actor):
                    self.actors[index] = actor
                else:
                    forget_actor(actor, engine_name(index))
        found = [index for index, actor in enumerate(self.actors) if actor is not None]
        self.watch(found)
        for index in {*self._all} - {*found}:
            self._calls.watch.gone(processes.engine(index))
        return found

    def ask(self, method: str, *arguments: Any, **named: Any) -> list[Any]:
        """Call a method of every engine; their answers, in order."""
        return self._calls.ask(self.actors, method, *arguments, **named)

    def ask_some(self, indices: Sequence[int], method: str, *arguments: Any) -> list[Any]:
        """Call a method of some of the engines."""
        return self._calls.ask([self.actors[index] for index in indices], method, *arguments)

    def abort(self) -> None:
        """Stop everything that is being generated."""
        with suppress(EngineDiedError):  # a dead one writes nothing
            self.ask("abort")

    def dead(self) -> list[int]:
        """Look now: the engines of which a process is gone."""
        return [i for i in self._all if self._calls.has_died(processes.engine(i), "generate")]

    def restart(self, dead: Sequence[int]) -> None:
        """Replace dead engines by new ones, with the weights of the model's files.

        Raises:
            StackError: one could not start; none is left half started.
        """
        before = {process.pid for process in self._calls.cluster.processes()}
        try:
            for index in dead:
                with held():  # an actor without a handle would keep its name
                    forget_actor(self.actors[index], engine_name(index))
                    new = make_engine(self._settings, self._placement, index, NEVER_HANDED)
                    self.actors[index] = new
            started = [self.actors[index].start.remote() for index in dead]
            self._calls.get(started, "start", self._settings.config.engine.start_timeout)
            self.watch(dead)
        except BaseException:
            for index in dead:
                forget_actor(self.actors[index], engine_name(index))
            processes.end([p for p in self._calls.cluster.processes() if p.pid not in before])
            raise


def shares(count: int, among: int) -> list[slice]:
    """Split `count` things into neighbouring, non-empty stretches, as even as can be."""
    among = min(among, count)
    return [slice(i * count // among, (i + 1) * count // among) for i in range(among)]


AGAIN = 0.2
"""Seconds until what is left is told to stop again: a request may arrive after the first word."""

RETRIES = 2
"""How often what a dead engine was asked is asked again."""

Key = TypeVar("Key")

Handover = Literal["response", "call", "all"]


class Request(NamedTuple, Generic[Key]):
    """One prompt that is to be continued."""

    key: Key
    """Under which its response is handed over."""
    prompt: list[int]
    seed: int
    budget: int | None = None
    """The most new tokens; None takes what the sampling settings say."""


Response = tuple[Key, "Generation"]
"""(the request's key, what was written)."""


class RequestStream(Generic[Key]):
    """Responses that the engines write, handed over as they are finished.

    Iterate over it for parts: lists of responses. The engines do not wait for whoever iterates.
    Iterating again goes on, once more with the part that an exception came upon. After `stop`, what
    was not finished is handed over with the tokens that there are.

    If an engine dies, the others finish; then it is started again and asked for what is left.
    """

    def __init__(
        self,
        engines: EngineGroup,
        calls: Calls,
        sampling: SamplingSettings,
        *,
        handover: Handover,
        timeout: float,
        make_ready: Callable[[], None],
        at_end: Callable[[], None],
    ) -> None:
        """Ask for nothing yet; see `ask`.

        Args:
            engines: that write.
            calls: waits for them.
            sampling: the same for all requests.
            handover: when responses are handed over: each `response` as it is finished, each `call`
                as all of its responses are, or `all` at once, which is fastest where that is soon.
            timeout: seconds within which the next part has to be there.
            make_ready: starts dead engines, and gives all of them their weights.
            at_end: called when everything is handed over.
        """
        self._engines, self._waiter, self._sampling = engines, calls, sampling
        self._handover, self._timeout = handover, timeout
        self._make_ready, self._at_end = make_ready, at_end
        self._calls: dict[Any, tuple[Sequence[Request[Key]], int | None]] = {}
        """By call: what it was asked, and the engine that `ask` was told."""
        self._unanswered: set[Key] = set()
        self._lost: list[tuple[list[Request[Key]], int | None]] = []
        """What calls of dead engines have not answered."""
        self._retries = 0
        self._stopped = False
        self._part: list[Response[Key]] = []
        """What is being handed over, so that an interrupt cannot lose it."""
        self._fetched: dict[Any, Any] = {}
        """By call, an answer that was taken from Ray and not read yet."""
        self._begin = time.perf_counter()
        self.seconds = 0.0
        """From the first request until the last of the responses handed over was written, however
        late it was fetched."""

    @property
    def pending(self) -> int:
        """Number of calls that are not answered."""
        return len(self._calls) + len(self._lost)

    @property
    def is_read(self) -> bool:
        """Whether somebody is at it: something is being written, or handed over."""
        return bool(self.pending or self._part)

    def ask(self, requests: Sequence[Request[Key]], engine: int | None = None) -> None:
        """Send requests, in one call an engine.

        Args:
            requests: neighbours go to one engine: they may have their prompt in common.
            engine: takes all of them, by its number modulo the engines; None shares them out.
        """
        self._waiter.refuse_without_head("generate")
        actors = self._engines.actors
        if engine is not None:
            actors, parts = [actors[engine % len(actors)]], [slice(None)]
        else:
            parts = shares(len(requests), len(actors))
        self._unanswered |= {request.key for request in requests}
        for actor, part in zip(actors, parts, strict=False):
            own = requests[part]
            _, prompts, seeds, budgets = map(list, zip(*own, strict=True))
            method = actor.generate_in_parts if self._handover == "response" else actor.generate
            limits = [] if None in budgets else [budgets]
            call = method.remote(prompts, self._sampling, seeds, *limits)
            self._calls[call] = own, engine

    def stop(self) -> None:
        """Abort what is not finished."""
        self._stopped = True
        self._engines.abort()

    def __iter__(self) -> Iterator[list[Response[Key]]]:
        """Parts, in the order in which they are finished.

        Raises:
            StackError: an engine failed, or no part was finished in time.
        """
        while part := self._next():
            yield part
            self._part = []
            if not self.pending:
                self._at_end()

    def take(self) -> list[Response[Key]]:
        """Wait for the next part, and have it; empty where nothing is left. Raises StackError."""
        part, self._part = self._next(), []
        return part

    def _next(self) -> list[Response[Key]]:
        while not self._part and self.pending:
            if not self._calls:
                self._ask_again()
                continue
            for call in self._ready():
                self._read(call)
            if self._handover != "response":
                self._part.sort(key=itemgetter(0))
        return self._part

    def _ready(self) -> list[Any]:
        """Calls that have something to hand over, or are at their end."""
        least = len(self._calls) if self._handover == "all" else 1
        while True:
            stopped = self._stopped
            seconds = AGAIN if stopped else self._timeout
            ready = self._waiter.wait([*self._calls], least, "generate", seconds)
            if len(ready) >= least:
                break
            if not stopped:
                raise self._waiter.late("generate did not finish a response", self._timeout)
            self._engines.abort()
        if self._handover == "call":  # those too that are finished by now
            ready = self._waiter.wait([*self._calls], len(self._calls), "generate", 0.0)
        return ready

    def _read(self, call: Any) -> None:
        """Add what a call has answered to the part."""
        (requests, engine), answer, seconds = self._calls[call], call, 0.0
        written: Sequence[tuple[int, Generation]] = ()
        if self._handover == "response":
            if call not in self._fetched:
                self._fetched[call] = next(call, None)
            answer = self._fetched[call]
        try:
            if answer is call:
                written = [*enumerate(self._waiter.get(call, "generate"))]
                seconds = time.perf_counter() - self._begin
            elif answer is not None:
                seconds, written = self._waiter.get(answer, "generate")
        except EngineDiedError:
            if self._retries >= RETRIES and not self._stopped:
                raise
            answer = None
            self._lost.append(([r for r in requests if r.key in self._unanswered], engine))
        self._part += [(requests[place].key, generation) for place, generation in written]
        self._unanswered -= {requests[place].key for place, _ in written}
        self.seconds = max(self.seconds, seconds)
        if answer is call or answer is None:  # it has no further part
            del self._calls[call]
        self._fetched.pop(call, None)

    def _ask_again(self) -> None:
        """Ask for what dead engines had to write; forget it where the stream was stopped."""
        lost, self._lost = self._lost, []
        if self._stopped:
            return
        self._retries += 1
        self._make_ready()
        for requests, engine in lost:
            self.ask(requests, engine)
