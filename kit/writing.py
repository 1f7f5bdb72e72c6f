"""`Writing`: the samples of one rollout while the engine writes them.

    engine    │ writes ........................................ │ sleeps
    notebook  │ next prompts to tokens │ tokens to text, rewards │ what came last

What the notebook's process has to do with a response it does while others are being written, in
the thread that waits for them anyway.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Self

from kit.errors import StackError
from kit.interrupts import held
from kit.samples import Rollout, Sample, Status

if TYPE_CHECKING:
    from kit.prompting import Prompting
    from kit.stack.engine import Generation
    from kit.stack.underway import Parts


class Writing:
    """Iterate over it for what is written. An exception in its `with` stops the engine; what it has
    written by then is there after `rest()`.
    """

    def __init__(
        self, prompting: Prompting, samples: list[Sample], parts: Parts, step: int
    ) -> None:
        self.samples = samples
        """All of them, in order; PENDING until they are written."""
        self._prompting, self._parts, self._step = prompting, parts, step
        self._answers: dict[int, Generation] = {}
        """By place; what is handed over and not a sample yet."""
        self._engine_failed = False

    def renumber(self, first_group: int) -> None:
        """Have the groups numbered from `first_group`, before anything is written."""
        self.samples = [replace(s, group_index=first_group + s.group_index) for s in self.samples]

    def __iter__(self) -> Iterator[list[int]]:
        """Places in `samples` that were written since."""
        for part in self._parts:
            self._answers.update(part)
            self._write()
            yield [place for place, _ in part]

    def _write(self) -> None:
        for place, answer in self._answers.items():
            if self.samples[place].status is Status.PENDING:  # else an interrupt came in between
                self.samples[place] = self._prompting.written(self.samples[place], answer)
        self._answers.clear()

    def rest(self) -> None:
        """Wait for what was not iterated over, such as the beginnings that stopping has left."""
        with held():
            with suppress(StackError):
                for part in () if self._engine_failed else self._parts:
                    self._answers.update(part)
            self._write()

    def rollout(self) -> Rollout:
        """What is written: all samples, unless somebody interrupted."""
        written = (s for s in self.samples if s.status is not Status.PENDING)
        return Rollout(written, self._step, self._parts.seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._engine_failed = isinstance(error, StackError)
        if error and not self._engine_failed:
            with held(), suppress(StackError):  # what went wrong first is what is told
                self._parts.stop()
