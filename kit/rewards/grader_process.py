"""A helper process for the graders that compute with what a model wrote.

math-verify and reasoning-gym hand parts of a response to sympy, which a few characters
(`9^{9^{9^9}}`) can keep busy for hours, and as easily a regular expression. A timer could stop it,
but timers only reach the main thread of a process, and not inside every library; and in any other
thread a search holds Python's lock. So these graders run in a process of their own, which any
thread may ask and which has a few seconds of CPU time and a bound on memory for each answer. A
response that exceeds them is graded 0.

Loading a library takes a second or two, a grade about a millisecond.
"""

from __future__ import annotations

from typing import Any

from kit.errors import RewardError
from kit.rewards.helper_process import HelperProcess

CPU_SECONDS = 5.0
"""Processor time that grading one answer may take."""
_LOAD_SECONDS = 300.0
_WALL_SECONDS = 120.0
"""Last resort; the helper's own limits count CPU time, so that a busy machine is no reason."""


class Apart:
    """The helper process: started by the first call, and again after it had to be ended."""

    def __init__(self, cpu_seconds: float = CPU_SECONDS) -> None:
        self._cpu_seconds = cpu_seconds
        self._process = HelperProcess("grader_worker.py")

    def grade(self, kind: str, **arguments: Any) -> float:
        """Score one answer; 0 if computing it took too much time or memory.

        Raises RewardError where the label or row cannot be graded against, and where the helper
        cannot do its work.
        """
        with self._process.lock:
            try:
                reply = self._ask(kind, arguments)
            except BaseException:
                # An interrupt between question and answer would leave the answer for the next.
                self._process.end()
                raise
        if "error" in reply:
            raise RewardError(
                f"{kind} cannot grade this row: {reply['error']}",
                fix="correct the row's label, or choose a reward that fits it.",
            )
        return float(reply["score"])

    def close(self) -> None:
        """End the process. The next `grade` starts another."""
        with self._process.lock:
            self._process.end()

    def _ask(self, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self._process.send((kind, arguments, self._cpu_seconds))
        loaded = self._process.reply(_LOAD_SECONDS)
        if loaded is None or "broken" in loaded:
            why = (
                loaded["broken"] if loaded else f"it ended with exit code {self._process.exit_code}"
            )
            raise RewardError(
                f"The grader of {kind} could not start.",
                why=f"Its helper process says: {why}.",
                fix="check that math-verify and reasoning-gym are installed as "
                "requirements.lock has them.",
            )
        reply = self._process.reply(_WALL_SECONDS)
        if reply is None:
            self._process.end()
            return {"score": 0.0}
        return reply


helper = Apart()
"""The one that the built-in rewards share."""
