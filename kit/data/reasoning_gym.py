"""Rows of reasoning-gym tasks, generated when they are read.

Some tasks need half a second for one row, so ten thousand at the start are out of the question.
Row i is the i-th of a generated dataset; where its question belongs to the other split, the i-th
of the next dataset is taken, and so on. A question belongs to the held-out split by its hash,
which makes the splits disjoint without ever listing them, whatever their sizes and seeds.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any, overload

from kit.data.prompts import PromptRow
from kit.errors import DataError, did_you_mean

_HELD_OUT_ONE_IN = 4
_MOST_TRIES = 64


def task_names() -> list[str]:
    """Names of all tasks that can follow `reasoning_gym:`."""
    _reasoning_gym()
    from reasoning_gym.factory import DATASETS

    # `composite` mixes other tasks and has nothing to ask by itself.
    return sorted(set(DATASETS) - {"composite"})


class GymRows(Sequence[PromptRow]):
    """The rows of one split of one task. Raises DataError for a task that does not exist.

    `window` selects a part of the `size` rows. The held-out rows do not depend on
    `seed`, so that runs with different seeds compare.
    """

    def __init__(
        self, task: str, split: str, size: int, seed: int, window: slice = slice(None)
    ) -> None:
        if task not in task_names():
            raise DataError(
                f"reasoning-gym has no task {task!r}.",
                fix=f"{did_you_mean(task, task_names())} `kit.data.reasoning_gym.task_names()` "
                "lists all.",
            )
        self.task, self.split, self.size = task, split, size
        self._wanted = range(size)[window]
        self._seed = seed if split == "train" else 0
        self._datasets: list[Any] = []
        self._rows: dict[int, PromptRow] = {}

    @property
    def fingerprint(self) -> str:
        """Hash of the settings that generate the rows, so that no row has to be generated."""
        made_by = version("reasoning-gym")
        text = f"{made_by} {self.task} {self.split} {self.size} {self._seed} {self._wanted}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._wanted)

    @overload
    def __getitem__(self, index: int) -> PromptRow: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[PromptRow]: ...
    def __getitem__(self, index: int | slice) -> PromptRow | Sequence[PromptRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = self._wanted[index]
        if index not in self._rows:
            self._rows[index] = self._make(index)
        return self._rows[index]

    def _make(self, index: int) -> PromptRow:
        for attempt in range(_MOST_TRIES):
            entry = self._dataset(attempt)[index]
            if _is_held_out(entry["question"]) == (self.split == "eval"):
                answer = entry["answer"]
                return PromptRow(
                    prompt=entry["question"],
                    label=None if answer is None else str(answer),
                    metadata={"dataset": self.task, "entry": entry},
                    number=index + 1,
                )
        raise DataError(
            f"reasoning_gym:{self.task} has too few different questions: in {_MOST_TRIES} tries "
            f"none belonged to the {self.split} split.",
            fix="choose another task, or give data.source and data.eval_source as files.",
        )

    def _dataset(self, attempt: int) -> Any:
        while len(self._datasets) <= attempt:
            # reasoning-gym seeds row i with seed + i: neighbouring seeds share nearly all rows.
            key = f"{self.task} {self.split} {self._seed} {len(self._datasets)}"
            seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1
            self._datasets.append(
                _reasoning_gym().create_dataset(self.task, size=self.size, seed=seed)
            )
        return self._datasets[attempt]


def _is_held_out(question: str) -> bool:
    digest = hashlib.sha256(question.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


def _reasoning_gym() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a dependency has syntax that Python warns about
        import reasoning_gym

    return reasoning_gym
