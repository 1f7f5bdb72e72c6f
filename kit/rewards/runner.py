"""`score_samples`: any reward over any samples, where one failure spoils one sample only.

`score_each` also returns the seconds and the exception of each sample. `Scoring` takes samples one
by one, so that the first are scored while the last are still being generated.

A reward function that raises, or returns something that is no number, marks its sample as failed
and says why; the others keep their rewards. What cannot be meant (a batch function that returns
three values for 128 samples) is an error: rewards are never broadcast. `to_reward` says what counts
as a reward, `failure_message` words a failure in one line.
"""

from __future__ import annotations

import asyncio
import bdb
import inspect
import math
import threading
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from dataclasses import dataclass, replace
from decimal import Decimal
from functools import partial
from inspect import unwrap
from numbers import Real
from typing import Any, Self, TypeAlias, TypeVar

from kit.errors import KitError, RewardError
from kit.rewards.registry import of_weights
from kit.rewards.timeouts import LIMIT, RewardTimeoutError, limited
from kit.samples import Sample, Status

Reward: TypeAlias = str | Mapping[str, float] | Callable[..., Any]
"""A built-in's name, weights by name, or a function of a sample or of all samples."""

T = TypeVar("T")

_AT_ONCE = 32
"""How many calls of an async reward function wait together."""
_LAST_WORDS_SECONDS = 5.0
"""How long an interrupted async reward may take to clean up."""
_STATUS_BEFORE = "status_before_failure"
_BATCH_NAMES = ("samples", "rollout", "batch")
_BATCH_TYPES = ("list", "List", "Sequence", "tuple", "Tuple", "Iterable", "Rollout")


@dataclass(frozen=True, slots=True)
class Scored:
    """A scored sample, with the seconds and the exception of its call."""

    sample: Sample
    seconds: float | None = None
    """How long its own call took; None where one call scored all samples, or none was made."""
    exception: Exception | None = None
    """What was raised instead of a reward, with its traceback."""


def score_samples(samples: Sequence[Sample], reward: Reward) -> list[Sample]:
    """Score samples and return them with their rewards, in order.

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
    """Score samples as `score_samples` does; also return the seconds and exception of each.

    Calls of an async function overlap, so their seconds add up to more than the time that passed.
    """
    with Scoring(reward) as scoring:
        for place, sample in enumerate(samples):
            scoring.add(place, sample)
        scoring.finish()
    return [scoring.scored[place] for place in range(len(samples))]


class Scoring:
    """Scores samples as they arrive; a context manager.

    `add` calls a function of one sample, in the caller's thread. `add` starts an async one in a
    thread of its own, and `finish` waits for it. `finish` calls a function of all samples. The
    rewards are those of `score_samples`; the calls come in the order of `add`.
    """

    def __init__(self, reward: Reward) -> None:
        """Raise RewardError for a reward that cannot be called."""
        self.scored: dict[int, Scored] = {}
        """What is scored so far, by place."""
        self._function = reward_function(reward)
        self._whole = _takes_batch(self._function)
        functions = self._function, code_owner(self._function)
        self._async = not self._whole and any(map(inspect.iscoroutinefunction, functions))
        self._waiting: dict[int, Sample] = {}
        self._calls: list[Future[None]] = []
        self._gate = asyncio.Semaphore(_AT_ONCE)

    def __enter__(self) -> Self:
        self._loop = _Loop() if self._async else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop:
            self._loop.close()

    def add(self, place: int, sample: Sample) -> None:
        """Score one more sample; `place` is its index in the rollout."""
        sample = _unmarked(sample)
        if sample.status is Status.ABORTED:
            self.scored[place] = Scored(sample)
        elif self._whole:
            self._waiting[place] = sample
        elif self._loop:
            self._calls.append(self._loop.begin(self._score_async(place, sample)))
        else:
            self.scored[place] = _marked(sample, _call(self._function, sample), self._function)

    def finish(self) -> None:
        """Score what is left. Raises RewardError for the wrong number of rewards."""
        if self._waiting:
            places = sorted(self._waiting)
            samples = [self._waiting[place] for place in places]
            outcomes = _call_batch(self._function, samples)
            for place, sample, outcome in zip(places, samples, outcomes, strict=True):
                self.scored[place] = _marked(sample, _Call(outcome), self._function)
        for call in wait(self._calls, return_when=FIRST_EXCEPTION).done:
            _result(call)

    async def _score_async(self, place: int, sample: Sample) -> None:
        async with self._gate:
            begin = time.perf_counter()
            try:
                calls = _guarded(self._function(sample))
                outcome = await asyncio.wait_for(calls, LIMIT.seconds)
            except _InterruptedError:
                raise
            except TimeoutError as error:
                late = LIMIT.seconds and time.perf_counter() - begin >= LIMIT.seconds
                outcome = RewardTimeoutError(LIMIT.seconds or 0.0) if late else error
            except Exception as error:
                outcome = error
            call = _Call(outcome, time.perf_counter() - begin)
        self.scored[place] = _marked(sample, call, self._function)


def check_reward(reward: Reward) -> None:
    """Raise RewardError for a reward that `score_samples` could not call."""
    _takes_batch(reward_function(reward))


def failure_summary(samples: Iterable[Sample]) -> list[str]:
    """Why samples failed, most frequent reason first: `3 of 8 samples: KeyError: 'x'`."""
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
    """Whether a function takes all samples at once.

    Raises RewardError if it cannot be called with one argument.
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


@dataclass(frozen=True, slots=True)
class _Call:
    """Outcome of a call: its value or its exception, and its seconds."""

    outcome: Any
    seconds: float | None = None


def _call(function: Callable[..., Any], sample: Sample) -> _Call:
    begin = time.perf_counter()
    try:
        with limited():
            outcome = function(sample)
    except bdb.BdbQuit:  # the user left the debugger: not to enter it 127 more times
        raise
    except Exception as error:
        outcome = error
    return _Call(outcome, time.perf_counter() - begin)


class _InterruptedError(Exception):
    """Carries an interrupt out of a task; asyncio lets a bare one fall through its loop."""

    def __init__(self, interrupt: BaseException) -> None:
        self.interrupt = interrupt


async def _guarded(awaitable: Awaitable[T]) -> T:
    try:
        return await awaitable
    except (KeyboardInterrupt, SystemExit, bdb.BdbQuit) as interrupt:
        raise _InterruptedError(interrupt) from None


def _call_batch(function: Callable[..., Any], samples: list[Sample]) -> Sequence[Any]:
    try:
        with limited(len(samples)):
            returned = function(samples)
            if inspect.iscoroutine(returned):
                returned = _run(returned)
        several = isinstance(returned, Iterable) and getattr(returned, "shape", None) != ()
        one = not several or isinstance(returned, (str, bytes, Mapping))
        values = None if one else list(returned)
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
    """The sample without its reward, and without the mark of a failed one."""
    metadata = dict(sample.metadata)
    before = metadata.pop(_STATUS_BEFORE, None)
    status = sample.status
    if status is Status.FAILED:
        status = Status(before) if before else Status.COMPLETED
    return replace(sample, reward=None, error=None, status=status, metadata=metadata)


class _Loop:
    """An event loop in a thread of its own: the notebook's own loop is busy running the cell."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._work, name="kit-reward", daemon=True)
        self._thread.start()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine beside the others, with the caller's context variables."""
        return asyncio.run_coroutine_threadsafe(_guarded(coroutine), self._loop)

    def close(self) -> None:
        """Cancel what still runs, allow it some time to clean up, and end the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=_LAST_WORDS_SECONDS)

    def _work(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        loop.run_forever()
        unfinished = asyncio.all_tasks(loop)
        for task in unfinished:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*unfinished, return_exceptions=True))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end."""
    loop = _Loop()
    try:
        return _result(loop.begin(coroutine))
    finally:
        loop.close()


def _result(call: Future[T]) -> T:
    try:
        return call.result()
    except _InterruptedError as error:
        raise error.interrupt from None


_LONGEST_MESSAGE = 300


class NotARewardError(Exception):
    """A reward function returned something other than a finite number."""


def to_reward(value: Any) -> float:
    """Convert to a float: numbers, booleans, NumPy and torch scalars.

    Raises NotARewardError for everything else, saying what it was.
    """
    if value is None:
        raise NotARewardError("the reward function returned None: is a `return` missing?")
    # Tensors and arrays are told apart by their shape; a list of one is not a number either.
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, (Real, Decimal)):
        raise NotARewardError(f"the reward function returned {describe(value)}, not a number")
    try:
        reward = float(value)
    except (OverflowError, ValueError) as error:
        raise NotARewardError(
            f"the reward function returned a number out of range: {error}"
        ) from None
    if not math.isfinite(reward):
        raise NotARewardError(f"the reward function returned {reward}, not a finite number")
    return reward


def describe(value: Any) -> str:
    """Describe a value: `'yes' (str)`, `a list of 3 values`, `a Tensor of shape (2, 1)`."""
    kind = type(value).__name__
    shape = getattr(value, "shape", None)
    if shape is not None:
        return f"a {kind} of shape {tuple(shape)}"
    if isinstance(value, (list, tuple, set, dict)):
        return f"a {kind} of {len(value)} values"
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({kind})"


def failure_message(error: Exception, function: Callable[..., Any]) -> str:
    """Say in one line what was raised, and in which line of the reward function.

    Lines are counted from the function's own first line, as a cell counts them that begins with
    the function.
    """
    if isinstance(error, NotARewardError):
        return str(error)
    if isinstance(error, KitError):
        return f"{type(error).__name__}: {error.what}" + (f" {error.fix}" if error.fix else "")
    words = " ".join(str(error).split())
    message = f"{type(error).__name__}: {words}" if words else type(error).__name__
    if len(message) > _LONGEST_MESSAGE:
        message = message[: _LONGEST_MESSAGE - 3] + "..."
    line = _line(error, function)
    return f"{message} (line {line} of reward function)" if line else message


def traceback_text(error: Exception, function: Callable[..., Any]) -> str:
    """Traceback of an exception, from the reward function's own frame on.

    Empty where the function returned a value that is no number, and raised nothing.
    """
    if isinstance(error, NotARewardError):
        return ""
    code = getattr(code_owner(function), "__code__", None)
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code is not code:
        trace = trace.tb_next
    lines = traceback.format_exception(type(error), error, trace or error.__traceback__)
    return "".join(lines).rstrip()


def code_owner(function: Callable[..., Any]) -> Callable[..., Any]:
    """The plain function behind partials, decorators and callable objects."""
    while isinstance(function, partial):
        function = function.func
    function = unwrap(function)
    if hasattr(function, "__code__") or hasattr(function, "__func__"):
        return function
    call: Callable[..., Any] = unwrap(type(function).__call__)
    return call


def _line(error: Exception, function: Callable[..., Any]) -> int | None:
    code = getattr(code_owner(function), "__code__", None)
    line = None
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code is code:
            line = number - frame.f_code.co_firstlineno + 1
    return line
