"""Reward functions that cannot stay in the notebook's process, in processes that can be killed.

`call_in_time` says which: those that did not end when told to, and those that need a main thread.
From then on such a function runs here, as it was when it moved, and its time limit holds whatever
it does. What it prints is shown; variables that it sets are those of its process.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import cloudpickle

from kit.errors import RewardError
from kit.rewards.helper_process import HelperProcess
from kit.rewards.outcomes import RemoteFailureError, Value, function_name
from kit.rewards.timeouts import GRACE_SECONDS, LIMIT, Outcome, RewardTimeoutError
from kit.samples import Sample

_LOAD_SECONDS = 300.0
_KEPT = 8
"""Functions remembered; the process of one that was moved before these is ended."""

_WHY = {
    "stuck": "did not end when its time (reward.timeout) was up",
    "thread": "needs a main thread, as code that sets signals does, and training with a dashboard "
    "or an async function runs in another",
}


class FunctionProcess:
    """A reward function in a process of its own."""

    def __init__(self, pickled: bytes) -> None:
        """Take a function as cloudpickle has it; the process starts with the first samples."""
        self._pickled = pickled
        self._process = HelperProcess("function_worker.py", stderr=None)

    def outcomes(self, samples: list[Sample]) -> list[Outcome]:
        """Score samples with one call, or with one each, as the function takes them.

        Raises RewardError for the wrong number of rewards.
        """
        with self._process.lock:
            try:
                return self._ask(samples)
            except BaseException:
                # An interrupt between question and answer would leave the answer for the next.
                self._process.end()
                raise

    def close(self) -> None:
        """End the process. The next samples start another."""
        with self._process.lock:
            self._process.end()

    def _ask(self, samples: list[Sample]) -> list[Outcome]:
        process, limit = self._process, LIMIT.seconds
        if not process.alive:
            process.send((sys.path, self._pickled))
            loaded = process.reply(_LOAD_SECONDS)
            if loaded is None or "broken" in loaded:
                why = loaded["broken"] if loaded else self._death()
                process.end()
                failure = RemoteFailureError(
                    f"the reward function cannot run in a process of its own: {why}"
                )
                return [Outcome(exception=failure)] * len(samples)
        seconds = None if limit is None else limit * len(samples)
        begin = time.monotonic()
        process.send((samples, limit))
        most = None if seconds is None else seconds + 2 * GRACE_SECONDS
        reply = process.reply(most)
        while reply and "importing" in reply:
            begin = time.monotonic()
            reply = process.reply(most)
        if reply is None:
            error: BaseException = RewardTimeoutError(seconds or 0.0)
            if seconds is None or time.monotonic() < begin + seconds:
                error = RemoteFailureError(self._death())
            process.end()
            return [Outcome(exception=error, seconds=seconds)] * len(samples)
        print(reply["printed"], end="")
        if "refused" in reply:
            what, why, fix = reply["refused"]
            raise RewardError(what, why=why, fix=fix)
        return [_outcome(row, limit) for row in reply["scored"]]

    def _death(self) -> str:
        return f"the process of the reward function ended (exit code {self._process.exit_code})"


def _outcome(row: dict[str, Any], limit: float | None) -> Outcome:
    error: BaseException | None = None
    if row["late"]:
        error = RewardTimeoutError(limit or 0.0)
    elif row["error"] is not None:
        error = RemoteFailureError(row["error"], row["traceback"])
    return Outcome(Value(row["reward"] or 0.0, row["parts"]), error, row["seconds"])


@dataclass(frozen=True, slots=True)
class Moved:
    """A function that cannot stay, and where it runs now."""

    function: Callable[..., Any]
    process: FunctionProcess | None
    why_not: str = ""
    """Why it could not be moved, where there is no process."""


_moved: deque[Moved] = deque(maxlen=_KEPT)


def moved(function: Callable[..., Any]) -> Moved | None:
    """Where an earlier call moved a function to; None if it may stay."""
    for entry in _moved:
        if entry.function is function:
            return entry
        # A bound method is made anew by each `judge.reward`.
        if isinstance(function, MethodType) and entry.function == function:
            return entry
    return None


def move(function: Callable[..., Any], why: Literal["stuck", "thread"]) -> Moved:
    """Give a function a process of its own, if it can be sent to one, and say so in a warning."""
    known = moved(function)
    if known:
        return known
    name = function_name(function)
    try:
        entry = Moved(function, FunctionProcess(cloudpickle.dumps(function)))
        then = (
            "From now on it runs in a process of its own: what it prints is shown, but variables "
            "that it sets stay there, and breakpoints do not work."
        )
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        entry = Moved(function, None, reason)
        then = f"It cannot be sent to a process of its own, where it could be ended: {reason}."
    if len(_moved) == _KEPT and (oldest := _moved[0].process):
        oldest.close()
    _moved.append(entry)
    fix = (
        "give what it waits for a time limit of its own, or raise reward.timeout"
        if why == "stuck"
        else "train in the cell, with show=False"
    )
    warnings.warn(
        f"The reward function {name} {_WHY[why]}. {then} What to do, if it is to stay: {fix}.",
        RuntimeWarning,
        stacklevel=2,
    )
    return entry
