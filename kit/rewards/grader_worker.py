"""The helper process of `grader_process.py`: grades requests one by one until its input ends.

Run by path, not imported. Requests come as pickles from the parent, which made them itself;
replies go back as JSON lines, because what happens here has touched text that a model wrote.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

MEMORY_LIMIT = 8 << 30
"""Bytes of address space; 9**9**9 ends in MemoryError instead of a machine that swaps."""


class OutOfTime(BaseException):
    """The time is up. A BaseException, so that a library's `except Exception` cannot catch it."""


class BadLabelError(Exception):
    """The label cannot be graded against, whatever the response is."""


def load_math() -> Callable[..., float]:
    """Load the grader of `math`: 1 if the final expressions of response and label are equal."""
    from math_verify import parse, verify

    def grade(response: str, label: str) -> float:
        marked = "$" in label or "\\boxed" in label or "\\(" in label or "\\[" in label
        # A bare label such as x^2+1 or (1,2) is only read whole when it is marked as an answer.
        gold = parse(label if marked else f"\\boxed{{{label}}}", parsing_timeout=None)
        if not gold:
            raise BadLabelError(f"The label {label[:60]!r} holds no mathematics to compare with.")
        answer = parse(response, parsing_timeout=None)
        return float(verify(gold, answer, timeout_seconds=None))

    return grade


def load_reasoning_gym() -> Callable[..., float]:
    """Load the grader of `reasoning_gym`: each task's own scorer, on the row it generated."""
    import reasoning_gym

    scorers: dict[str, Callable[..., float]] = {}

    def grade(answer: str, dataset: str, entry: dict[str, Any]) -> float:
        if dataset not in scorers:
            scorers[dataset] = reasoning_gym.get_score_answer_fn(dataset)
        score = scorers[dataset]
        try:
            return float(score(answer=answer, entry=entry))
        except Exception:
            # A scorer that chokes on the response has met a wrong answer; one that chokes on
            # the right answer has met a row it cannot grade.
            try:
                score(answer=entry["answer"], entry=entry)
            except Exception as error:
                raise BadLabelError(f"{type(error).__name__}: {error}") from error
            return 0.0

    return grade


def load_format() -> Callable[..., float]:
    """Load the grader of `format`: 1 if the regular expression is found; `.` matches newlines."""

    def grade(response: str, pattern: str) -> float:
        return float(re.search(pattern, response, re.DOTALL) is not None)

    return grade


LOADERS = {"format": load_format, "math": load_math, "reasoning_gym": load_reasoning_gym}


@contextlib.contextmanager
def cpu_time(seconds: float) -> Iterator[None]:
    """Raise OutOfTime after so many seconds of processor time, however busy the machine is.

    Code that computes outside Python never sees the exception; the kernel kills the process soon
    after.
    """

    def ring(_: int, __: object) -> None:
        raise OutOfTime

    usage = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    end = int(usage.ru_utime + usage.ru_stime + 2 * seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (end if hard < 0 else min(end, hard), hard))
    signal.signal(signal.SIGVTALRM, ring)
    # Again and again: an exception raised inside a destructor is lost.
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))  # loading another library may last


def answer(grade: Callable[..., float], arguments: dict[str, Any], seconds: float) -> Any:
    """Reply to one request: a score, or why the label cannot be graded against."""
    try:
        with cpu_time(seconds):
            return {"score": grade(**arguments)}
    except BadLabelError as error:
        return {"error": str(error)}
    except (OutOfTime, Exception):
        return {"score": 0.0}


def main() -> None:
    """Serve requests of (kind, arguments, seconds) until the input ends."""
    # Libraries print to standard output; replies need a way of their own.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    # An interrupt of the notebook reaches its whole process group; the parent ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = MEMORY_LIMIT if hard < 0 else min(MEMORY_LIMIT, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    graders: dict[str, Callable[..., float]] = {}
    while True:
        try:
            kind, arguments, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        if kind not in graders:
            try:
                graders[kind] = LOADERS[kind]()
            except Exception as error:
                reply({"broken": f"{type(error).__name__}: {error}"})
                continue
        reply({"loaded": kind})
        reply(answer(graders[kind], arguments, seconds))


if __name__ == "__main__":
    main()
