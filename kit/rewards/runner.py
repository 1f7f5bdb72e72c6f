"""`score_samples`: any reward over any samples, where one failure spoils one sample only.

`score_each` is the same with more to tell of each sample: how long it took, what was raised.

A reward function that raises, or returns something that is no number, marks its sample as failed
and says why; the others keep their rewards. What cannot be meant (a batch function that returns
three values for 128 samples) is an error: rewards are never broadcast.
"""

from __future__ import annotations

import asyncio
import bdb
import contextlib
import inspect
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from kit.errors import RewardError
from kit.rewards.registry import of_weights
from kit.rewards.values import NotARewardError, code_owner, describe, failure_message, to_reward
from kit.samples import Sample, Status

Reward: TypeAlias = str | Mapping[str, float] | Callable[..., Any]
"""A built-in's name, weights by name, or a function of a sample or of all samples."""

_AT_ONCE = 32
"""How many calls of an async reward function wait together."""
_LAST_WORDS_SECONDS = 5.0
"""How long an interrupted async reward may take to clean up."""
_STATUS_BEFORE = "status_before_failure"
_BATCH_NAMES = ("samples", "rollout", "batch")
_BATCH_TYPES = ("list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Rollout")


@dataclass(frozen=True, slots=True)
class Scored:
    """One sample with its reward, and how it came by it."""

    sample: Sample
    seconds: float | None = None
    """How long its own call took; None where one call scored all samples, or none was made."""
    exception: Exception | None = None
    """What was raised instead of a reward, with its traceback."""


def score_samples(samples: Sequence[Sample], reward: Reward) -> list[Sample]:
    """The samples with their rewards, in order.

    Args:
        samples: those that were aborted keep no reward and are not shown to the function.
        reward: a built-in's name, weights by name, or a function. A function gets one sample and
            returns one number; where its parameter is called `samples` (or `rollout`, `batch`)
            or annotated as a list or sequence, it gets all of them and returns one number each.
            It may be async: calls for single samples then wait together.

    A sample whose reward fails is marked `Status.FAILED` with the reason in `error`; a batch
    function that raises marks all. Scoring again gives a marked sample its status back.

    Raises RewardError for an unknown name, a function of the wrong form, and a batch function
    that returns the wrong number of values. An interrupt is never swallowed.
    """
    return [scored.sample for scored in score_each(samples, reward)]


def score_each(samples: Sequence[Sample], reward: Reward) -> list[Scored]:
    """What `score_samples` returns, with the seconds and the exception of each sample.

    Calls of an async function wait together, so the sum of their seconds is more than passed.
    """
    function = reward_function(reward)
    fresh = [_unmarked(sample) for sample in samples]
    open_samples = [sample for sample in fresh if sample.status is not Status.ABORTED]
    if not open_samples:
        return [Scored(sample) for sample in fresh]
    calls: list[_Call]
    if _takes_batch(function):
        calls = [_Call(outcome) for outcome in _call_batch(function, open_samples)]
    elif _is_async(function):
        calls = _run(_call_each_async(function, open_samples))
    else:
        calls = [_call(function, sample) for sample in open_samples]
    results = iter(
        _marked(sample, call, function) for sample, call in zip(open_samples, calls, strict=True)
    )
    return [Scored(s) if s.status is Status.ABORTED else next(results) for s in fresh]


def check_reward(reward: Reward) -> None:
    """Raise RewardError for what `score_samples` could not call, before there are samples."""
    _takes_batch(reward_function(reward))


def failure_summary(samples: Iterable[Sample]) -> list[str]:
    """The reasons why samples failed, the most frequent first: `3 of 8 samples: KeyError: 'x'`."""
    every = list(samples)
    reasons = Counter(
        sample.error or "no reason given" for sample in every if sample.status is Status.FAILED
    )
    return [f"{count} of {len(every)} samples: {why}" for why, count in reasons.most_common()]


def reward_function(reward: Reward) -> Callable[..., Any]:
    """The function behind a name, weights or a function. Raises RewardError for anything else."""
    if isinstance(reward, str):
        return of_weights({reward: 1.0})
    if isinstance(reward, Mapping):
        return of_weights(reward)
    if not callable(reward):
        raise RewardError(
            f"A reward cannot be {describe(reward)}.",
            fix="give a built-in's name ('exact'), weights ({'math': 0.9, 'format': 0.1}) or a "
            "function of a sample.",
        )
    return reward


def _takes_batch(function: Callable[..., Any]) -> bool:
    """Whether a function wants all samples at once. Raises RewardError where it cannot be called
    with one argument.
    """
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some functions written in C have none
        return False
    try:
        signature.bind(None)
    except TypeError:
        raise RewardError(
            f"The reward function takes {signature}, but is called with one argument.",
            fix="write `def reward(sample): ...` for one sample at a time, or "
            "`def reward(samples): ...` for all at once; sample.response, sample.label and "
            "sample.metadata hold the rest.",
        ) from None
    first = next(iter(signature.parameters.values()))
    return first.name in _BATCH_NAMES or _type_name(first.annotation) in _BATCH_TYPES


def _type_name(annotation: Any) -> str:
    """`Sequence` for Sequence[Sample], typing.Sequence and the text "Sequence[Sample]"."""
    if not isinstance(annotation, str):
        annotation = getattr(annotation, "__name__", str(annotation))
    return str(annotation).partition("[")[0].rpartition(".")[2]


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        code_owner(function)
    )


@dataclass(frozen=True, slots=True)
class _Call:
    """What a call returned, or the exception that came instead, and how long it took."""

    outcome: Any
    seconds: float | None = None


def _call(function: Callable[..., Any], sample: Sample) -> _Call:
    begin = time.perf_counter()
    try:
        outcome = function(sample)
    except bdb.BdbQuit:  # the user left the debugger: not to enter it 127 more times
        raise
    except Exception as error:
        outcome = error
    return _Call(outcome, time.perf_counter() - begin)


async def _call_each_async(function: Callable[..., Any], samples: Sequence[Sample]) -> list[_Call]:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def call(sample: Sample) -> _Call:
        async with gate:
            begin = time.perf_counter()
            try:
                outcome = await _guarded(function(sample))
            except _InterruptedError:
                raise
            except Exception as error:
                outcome = error
            return _Call(outcome, time.perf_counter() - begin)

    return await asyncio.gather(*(call(sample) for sample in samples))


class _InterruptedError(Exception):
    """Carries an interrupt out of a task; asyncio lets a bare one fall through its loop."""

    def __init__(self, interrupt: BaseException) -> None:
        self.interrupt = interrupt


async def _guarded(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except (KeyboardInterrupt, SystemExit, bdb.BdbQuit) as interrupt:
        raise _InterruptedError(interrupt) from None


def _call_batch(function: Callable[..., Any], samples: list[Sample]) -> Sequence[Any]:
    try:
        returned = function(samples)
        if inspect.iscoroutine(returned):
            returned = _run(returned)
        values = _values(returned)
    except bdb.BdbQuit:
        raise
    except Exception as error:
        return [error] * len(samples)
    if values is None or len(values) != len(samples):
        count = "a single value" if values is None else f"{len(values)} rewards"
        raise RewardError(
            f"The reward function returned {count} for {len(samples)} samples.",
            why=f"It returned {describe(returned)}; rewards are never broadcast.",
            fix="return a list with one number per sample, in the samples' order; a function of "
            "one sample has a parameter called `sample`.",
        )
    return values


def _values(returned: Any) -> list[Any] | None:
    """What a batch function returned, as a list; None where it is no list of values."""
    if getattr(returned, "shape", None) == () or isinstance(returned, (str, bytes, Mapping)):
        return None
    return list(returned) if isinstance(returned, Iterable) else None


def _marked(sample: Sample, call: _Call, function: Callable[..., Any]) -> Scored:
    outcome = call.outcome
    try:
        if isinstance(outcome, Exception):
            raise outcome
        if inspect.iscoroutine(outcome):
            outcome.close()
            raise NotARewardError(
                "the reward function returned a coroutine: write it with `async def` and `await`"
            )
        return Scored(sample.with_reward(to_reward(outcome)), call.seconds)
    except Exception as error:
        failed = sample.with_failure(failure_message(error, function))
        metadata = {**sample.metadata, _STATUS_BEFORE: sample.status.value}
        return Scored(replace(failed, metadata=metadata), call.seconds, error)


def _unmarked(sample: Sample) -> Sample:
    """A sample as it was before its reward failed, without a reward."""
    metadata = dict(sample.metadata)
    before = metadata.pop(_STATUS_BEFORE, None)
    status = sample.status
    if status is Status.FAILED:
        status = Status(before) if before else Status.COMPLETED
    return replace(sample, reward=None, error=None, status=status, metadata=metadata)


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end in a thread: the notebook's own loop is busy running the cell."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(_guarded(coroutine))
    outcome: Future[Any] = Future()

    def work() -> None:
        asyncio.set_event_loop(loop)
        try:
            outcome.set_result(loop.run_until_complete(task))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            _finish(loop)

    thread = threading.Thread(target=work, name="kit-reward", daemon=True)
    try:
        thread.start()
        return outcome.result()
    except _InterruptedError as error:
        raise error.interrupt from None
    finally:
        # Nothing to cancel but after an interrupt of this thread; by then the loop may be closed.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(task.cancel)
        thread.join(timeout=_LAST_WORDS_SECONDS)


def _finish(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what still waits in a loop, and close it."""
    unfinished = asyncio.all_tasks(loop)
    for task in unfinished:
        task.cancel()
    loop.run_until_complete(asyncio.gather(*unfinished, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()
