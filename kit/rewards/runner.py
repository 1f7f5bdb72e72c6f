"""`score_samples`: any reward over any samples, where one failure spoils one sample only.

`score_each` also returns the seconds and the exception of each sample. `Scoring` takes samples one
by one, so that the first are scored while the last are still being generated.

A reward function that raises (`sys.exit` raises too), or returns something that is no number, marks
its sample as failed and says why; the others keep their rewards. What cannot be meant (a batch
function that returns three values for 128 samples) is an error: rewards are never broadcast.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence, Set
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from typing import Any, Self

from kit.errors import RewardError
from kit.rewards import function_process
from kit.rewards.event_loop import (
    CarriedExitError,
    CarriedInterruptError,
    EventLoop,
    guarded,
    result,
    run_in_time,
)
from kit.rewards.outcomes import NotARewardError, describe, failure_message, to_value
from kit.rewards.signature import Form, Part, Reward, reward_parts
from kit.rewards.timeouts import (
    GRACE_SECONDS,
    LIMIT,
    Misfit,
    Outcome,
    RewardTimeoutError,
    call_in_time,
    names_threads,
)
from kit.samples import Sample, Status

_AT_ONCE = 32
"""How many calls of an async reward function wait together."""
_LOOK_SECONDS = 0.5
_STATUS_BEFORE = "status_before_failure"


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored sample, with the seconds and the exception of its call."""

    sample: Sample
    seconds: float | None = None
    """How long its own call took; None where one call scored all samples, or none was made."""
    exception: BaseException | None = None
    """What was raised instead of a reward, with its traceback."""
    function: Callable[..., Any] | None = None
    """What raised it."""


def score_samples(samples: Sequence[Sample], reward: Reward) -> list[Sample]:
    """Score samples and return them with their rewards, in order.

    Args:
        samples: those that were aborted keep no reward and are not shown to the function.
        reward: a built-in's name or a function; or several of them, with weights: by name,
            `{"math": 0.9, "short": (my_function, 0.1)}`, or as a list. A function gets one sample
            and returns one number; where its parameter is called `samples` (or `rollout`,
            `batch`) or annotated as a list or sequence, it gets all of them and returns one number
            each. `signature.py` lists the forms of other libraries. A mapping in place of a number
            holds the parts of the reward. A function may be async: calls for single samples then
            wait together. Where the prompt ended in a tag such as `<think>`, `sample.response`
            begins with it (`Sample.with_opening`).

    A sample whose reward fails is marked `Status.FAILED` with the reason in `error`; a batch
    function that raises marks all. Scoring again gives a marked sample its status back.

    Raises RewardError for an unknown name, a function of the wrong form, and a batch function
    that returns the wrong number of values. An interrupt is never swallowed.
    """
    return [scored.sample for scored in score_each(samples, reward)]


def score_each(samples: Sequence[Sample], reward: Reward, *, movable: bool = True) -> list[Scored]:
    """Score samples as `score_samples` does; also return the seconds and exception of each.

    Calls of an async function overlap, so their seconds add up to more than the time that passed.
    `movable` is that of `Scoring`.
    """
    with Scoring(reward, movable=movable) as scoring:
        for place, sample in enumerate(samples):
            scoring.add(place, sample)
        scoring.finish()
    return [scoring.scored[place] for place in range(len(samples))]


class Scoring:
    """Scores samples as they arrive; a context manager.

    `add` calls a function of one sample, in the caller's thread. `add` starts an async one in a
    thread of its own, and `finish` waits for it. `finish` calls a function of all samples. The
    rewards are those of `score_samples`; the calls come in the order of `add`.

    Args:
        reward: what to score with.
        movable: whether a function that cannot be limited here moves to a process of its own, with
            this and all later samples. Without, all its calls are made in the caller's thread.
    """

    def __init__(self, reward: Reward, *, movable: bool = True) -> None:
        """Raise RewardError for a reward that cannot be called."""
        self._parts = reward_parts(reward)
        self._scorings = [FunctionScoring(part.function, movable) for part in self._parts]

    def __enter__(self) -> Self:
        for scoring in self._scorings:
            scoring.begin()
        return self

    def __exit__(self, *_: object) -> None:
        for scoring in self._scorings:
            scoring.close()

    def add(self, place: int, sample: Sample) -> None:
        """Score one more sample; `place` is its index in the rollout."""
        for scoring in self._scorings:
            scoring.add(place, sample)

    def finish(self) -> None:
        """Score what is left. Raises RewardError for the wrong number of rewards."""
        for scoring in self._scorings:
            scoring.finish()

    @property
    def scored(self) -> dict[int, Scored]:
        """What is scored so far, by place."""
        first, *others = [scoring.scored for scoring in self._scorings]
        if not others and self._parts[0].weight == 1.0:
            return first
        return {
            place: _sum(self._parts, [one, *(other[place] for other in others)])
            for place, one in first.items()
            if all(place in other for other in others)
        }


def _sum(parts: Sequence[Part], scored: Sequence[Scored]) -> Scored:
    """One sample, scored by all parts: the weighted sum, or the first failure."""
    values: dict[str, float] = {}
    total = 0.0
    for part, one in zip(parts, scored, strict=True):
        if one.sample.reward is not None:
            total += part.weight * one.sample.reward
            values[part.name] = one.sample.reward
            for name, value in one.sample.reward_parts.items():
                values[f"{part.name}/{name}"] = value
    took = [one.seconds for one in scored if one.seconds is not None]
    seconds = sum(took) if took else None
    for part, one in zip(parts, scored, strict=True):
        if one.sample.reward is None:
            error = f"{part.name}: {one.sample.error}" if one.sample.error else None
            sample = replace(one.sample, error=error, reward_parts=values)
            return Scored(sample, seconds, one.exception, one.function)
    return Scored(scored[0].sample.with_reward(total, values), seconds)


class FunctionScoring:
    """Scores samples with one function; the part of `Scoring` for it."""

    def __init__(self, function: Callable[..., Any], movable: bool = True) -> None:
        """Raise RewardError for a function that cannot be called."""
        self.scored: dict[int, Scored] = {}
        self._function = function
        self._form = Form.of(function)
        self._bound = self._form.bind(function)
        self._whole = self._form.whole
        self._movable = movable
        self._moved = function_process.moved(self._function) if movable else None
        self._unopened: dict[int, Sample] = {}
        """The samples without what the function gets in front of their responses."""
        self._waiting: dict[int, Sample] = {}
        self._calls: _AsyncCalls | None = None

    def begin(self) -> None:
        """Start the event loop of an async function."""
        if self._form.awaits and self._movable and not self._whole and not self._process:
            self._calls = _AsyncCalls(self._bound)

    def close(self) -> None:
        """End the event loop of an async function."""
        if self._calls:
            self._calls.close()
            outcomes = self._calls.outcomes  # after an interrupt nobody has taken them yet
            done = {place: self._waiting[place] for place in outcomes if place not in self.scored}
            if not self._calls.needs_main:
                self._settle(done, [outcomes[place] for place in done])

    def add(self, place: int, sample: Sample) -> None:
        """Score one more sample; `place` is its index in the rollout."""
        sample = self._unopened[place] = _unmarked(sample)
        sample = sample.with_opening()
        if sample.status is Status.ABORTED:
            self.scored[place] = Scored(self._unopened[place])
        elif self._whole:
            self._waiting[place] = sample
        elif self._process:
            self._settle({place: sample}, self._process.outcomes([sample]))
        elif self._calls:
            self._waiting[place] = sample
            self._calls.add(place, sample)
        else:
            outcome = call_in_time(self._callable, sample, LIMIT.seconds)
            self._settle({place: sample}, [outcome], outcome.misfit)

    def finish(self) -> None:
        """Score what is left. Raises RewardError for the wrong number of rewards."""
        waiting = {place: self._waiting[place] for place in sorted(self._waiting)}
        if self._calls:
            self._finish_async(self._calls, waiting)
        elif waiting and self._process:
            self._settle(waiting, self._process.outcomes(list(waiting.values())))
        elif waiting:
            outcomes, misfit = _call_batch(self._callable, list(waiting.values()))
            self._settle(waiting, outcomes, misfit)

    @property
    def _process(self) -> function_process.FunctionProcess | None:
        return self._moved.process if self._moved else None

    @property
    def _callable(self) -> Callable[..., Any]:
        """The function; awaited in the caller's thread where it must not leave that."""
        if self._movable or not self._form.awaits:
            return self._bound
        return lambda argument: asyncio.run(self._bound(argument))

    def _settle(
        self, samples: Mapping[int, Sample], outcomes: Sequence[Outcome], misfit: Misfit = ""
    ) -> None:
        """Take the outcomes of calls, and see to a function that cannot stay in this process."""
        if misfit and self._movable:
            self._moved = function_process.move(self._function, misfit)
            if misfit == "thread":  # what it returned, if anything, is not what it would have
                outcomes = self._in_main_thread(list(samples.values()))
        for place, outcome in zip(samples, outcomes, strict=True):
            self.scored[place] = _marked(self._unopened[place], outcome, self._function)

    def _in_main_thread(self, samples: list[Sample]) -> list[Outcome]:
        assert self._moved is not None
        if self._process is None:
            failure = NotARewardError(
                "the reward function needs a main thread, and cannot be sent to a process of its "
                f"own: {self._moved.why_not}"
            )
            return [Outcome(exception=failure)] * len(samples)
        if self._whole:
            return self._process.outcomes(samples)
        return [outcome for one in samples for outcome in self._process.outcomes([one])]

    def _finish_async(self, calls: _AsyncCalls, samples: dict[int, Sample]) -> None:
        misfit = calls.wait()
        outcomes = calls.outcomes
        if misfit != "thread":
            done = {place: samples[place] for place in sorted(outcomes)}
            self._settle(done, [outcomes[place] for place in done], misfit)
            samples = {place: one for place, one in samples.items() if place not in outcomes}
        if not samples:
            return
        if misfit == "thread":
            self._settle(samples, [], misfit)
        elif self._process:
            self._settle(samples, self._in_main_thread(list(samples.values())))
        else:
            calls.close()
            self._calls = _AsyncCalls(self._bound)
            for place, sample in samples.items():
                self._calls.add(place, sample)
            self._finish_async(self._calls, samples)


class _AsyncCalls:
    """Calls of an async function of one sample, which wait together in a loop of their own."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._function = function
        self._loop = EventLoop()
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._calls: list[Future[None]] = []
        self._tasks: dict[int, asyncio.Task[Any] | None] = {}
        self._begun: dict[int, float] = {}
        self._blocked = False

    @property
    def needs_main(self) -> bool:
        """Whether a call set signals, which were refused: what it returned says nothing."""
        return self._loop.use.needs_main

    def add(self, place: int, sample: Sample) -> None:
        self._calls.append(self._loop.begin(self._score(place, sample)))

    def wait(self) -> Misfit:
        """Wait until all calls are done, or one blocks the loop. Raises an interrupt of theirs."""
        pending = set(self._calls)
        while pending:
            done, pending = wait(pending, _LOOK_SECONDS, FIRST_EXCEPTION)
            for call in done:
                result(call)
            if pending and self._look():
                return "stuck"
        errors = [outcome.exception for outcome in self.outcomes.values()]
        return "thread" if self.needs_main or any(map(names_threads, errors)) else ""

    def close(self) -> None:
        if self._blocked:
            self._loop.close(0.0)
        else:
            self._loop.close()

    def _look(self) -> bool:
        """Whether calls run on after their time, which asyncio cannot end; marks which do."""
        if LIMIT.seconds is None:
            return False
        latest = time.monotonic() - LIMIT.seconds - GRACE_SECONDS
        late = [p for p, at in self._begun.items() if at < latest and p not in self.outcomes]
        runs = self._loop.blocked_in()
        guilty = [place for place in late if self._tasks.get(place) is runs]
        for place in guilty or late:
            self.outcomes[place] = Outcome(exception=RewardTimeoutError(LIMIT.seconds))
        self._blocked = bool(late)
        return self._blocked

    async def _score(self, place: int, sample: Sample) -> None:
        async with self._gate:
            begin = self._begun[place] = time.monotonic()
            value: Any = None
            exception: BaseException | None = None
            call: Coroutine[Any, Any, Any] = guarded(self._call(place, sample))
            try:
                value = await asyncio.wait_for(call, LIMIT.seconds)
            except CarriedInterruptError:
                raise
            except TimeoutError as error:
                late = LIMIT.seconds and time.monotonic() - begin >= LIMIT.seconds
                exception = RewardTimeoutError(LIMIT.seconds or 0.0) if late else error
            except CarriedExitError as error:
                exception = error.exit
            except asyncio.CancelledError as error:
                task = asyncio.current_task()
                if task and task.cancelling():  # from `close`
                    raise
                exception = error
            except BaseException as error:
                exception = error
            passed = time.monotonic() - begin
            self.outcomes.setdefault(place, Outcome(value, exception, passed))

    async def _call(self, place: int, sample: Sample) -> Any:
        self._tasks[place] = asyncio.current_task()
        return await self._function(sample)


def failure_summary(samples: Iterable[Sample]) -> list[str]:
    """Why samples failed, most frequent reason first: `3 of 8 samples: KeyError: 'x'`."""
    every = list(samples)
    reasons = Counter(
        sample.error or "no reason given" for sample in every if sample.status is Status.FAILED
    )
    return [f"{count} of {len(every)} samples: {why}" for why, count in reasons.most_common()]


def _call_batch(
    function: Callable[..., Any], samples: list[Sample]
) -> tuple[list[Outcome], Misfit]:
    """Call a function of all samples; returns an outcome for each."""

    def call(samples: list[Sample]) -> Any:
        returned = function(samples)
        return list(returned) if inspect.isgenerator(returned) else returned

    limit = None if LIMIT.seconds is None else LIMIT.seconds * len(samples)
    outcome = call_in_time(call, samples, limit)
    if inspect.iscoroutine(outcome.value):
        outcome = run_in_time(outcome.value, limit)
    if outcome.exception is not None or outcome.misfit == "thread":
        return [Outcome(exception=outcome.exception)] * len(samples), outcome.misfit
    if isinstance(outcome.value, Set):
        raise RewardError(
            f"The reward function returned {describe(outcome.value)}, which has no order.",
            why="Nothing says which of its values belongs to which sample, and equal ones are one.",
            fix="return a list with one number per sample, in the samples' order.",
        )
    values = _values(outcome.value, len(samples))
    if values is None or len(values) != len(samples):
        count = "a single value" if values is None else f"{len(values)} rewards"
        raise RewardError(
            f"The reward function returned {count} for {len(samples)} samples.",
            why=f"It returned {describe(outcome.value)}; rewards are never broadcast.",
            fix="return a list with one number per sample, in the samples' order; a function of "
            "one sample has a parameter called `sample`.",
        )
    return [Outcome(value) for value in values], outcome.misfit


def _values(returned: Any, count: int) -> list[Any] | None:
    """The values that a batch function returned, as a list; None if it returned something else.

    A mapping of lists, one for each part, becomes a mapping for each sample.
    """
    if isinstance(returned, Mapping):
        columns = [_values(column, count) for column in returned.values()]
        if not columns or any(column is None or len(column) != count for column in columns):
            return None
        rows = zip(*(column for column in columns if column is not None), strict=True)
        return [dict(zip(returned, row, strict=True)) for row in rows]
    if getattr(returned, "shape", None) == () or isinstance(returned, (str, bytes)):
        return None
    return list(returned) if isinstance(returned, Iterable) else None


def _marked(sample: Sample, outcome: Outcome, function: Callable[..., Any]) -> Scored:
    error = outcome.exception
    if inspect.iscoroutine(outcome.value):
        outcome.value.close()
        error = NotARewardError(
            "the reward function returned a coroutine: write it with `async def` and `await`"
        )
    if error is None:
        try:
            value = to_value(outcome.value)
            return Scored(sample.with_reward(value.reward, value.parts), outcome.seconds)
        except Exception as failure:
            error = failure
    failed = sample.with_failure(failure_message(error, function))
    metadata = {**sample.metadata, _STATUS_BEFORE: sample.status.value}
    return Scored(replace(failed, metadata=metadata), outcome.seconds, error, function)


def _unmarked(sample: Sample) -> Sample:
    """The sample without its reward, and without the mark of a failed one."""
    metadata = dict(sample.metadata)
    before = metadata.pop(_STATUS_BEFORE, None)
    status = sample.status
    if status is Status.FAILED:
        status = Status(before) if before else Status.COMPLETED
    return replace(
        sample, reward=None, reward_parts={}, error=None, status=status, metadata=metadata
    )
