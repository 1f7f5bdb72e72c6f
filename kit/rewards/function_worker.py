"""The process of `function_process.py`: scores samples with one reward function.

Run by path, not imported. The function and the samples come as pickles from the parent; replies go
back as JSON lines, because what happens here has touched text that a model wrote.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import signal
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Load the function, then serve requests of (samples, seconds) until the input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what code outside Python prints
    # An interrupt of the notebook reaches its whole process group; the parent ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def reply(value: Any) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    path, pickled = pickle.load(sys.stdin.buffer)
    sys.path[:] = path
    try:
        function = pickle.loads(pickled)
    except Exception as error:
        reply({"broken": f"{type(error).__name__}: {error}"})
        return
    from kit.rewards.timeouts import TIMER

    TIMER.on_import = lambda: reply({"importing": True})
    reply({"loaded": True})
    while True:
        try:
            samples, seconds = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        reply(scored(function, samples, seconds))


def scored(function: Callable[..., Any], samples: Any, seconds: float | None) -> dict[str, Any]:
    """Reply to one request: a row a sample, and what was printed."""
    from kit.errors import RewardError
    from kit.rewards.outcomes import traceback_text
    from kit.rewards.runner import score_each
    from kit.rewards.timeouts import LIMIT, RewardTimeoutError

    LIMIT.seconds = seconds
    printed = io.StringIO()
    reply: dict[str, Any] = {}
    with contextlib.redirect_stdout(printed):
        try:
            reply["scored"] = [
                {
                    "reward": one.sample.reward,
                    "parts": one.sample.reward_parts,
                    "error": one.sample.error,
                    "seconds": one.seconds,
                    "late": isinstance(one.exception, RewardTimeoutError),
                    "traceback": traceback_text(one.exception, function),
                }
                for one in score_each(samples, function, movable=False)
            ]
        except RewardError as error:
            reply["refused"] = [error.what, error.why, error.fix]
    return reply | {"printed": printed.getvalue()}


if __name__ == "__main__":
    main()
