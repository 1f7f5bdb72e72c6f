"""`RolloutBuffer`: groups of samples that wait to be continued; part of a session's checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kit.errors import DataError
from kit.samples import Sample, Status

Group = tuple[Sample, ...]
"""The samples of one prompt, some finished and some not."""


def unfinished(sample: Sample) -> bool:
    """Whether the engine has more to write."""
    return sample.status in (Status.PENDING, Status.ABORTED)


class RolloutBuffer:
    """First in, first out. Nothing empties it but `take`."""

    def __init__(self, groups: Iterable[Group] = ()) -> None:
        self._groups: deque[Group] = deque()
        self.put(groups)

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[Group]:
        """Groups in the order in which they have waited, the longest first."""
        return iter(self._groups)

    def put(self, groups: Iterable[Group]) -> None:
        """Let groups wait behind those that wait already. One without samples is dropped."""
        self._groups.extend(group for group in groups if group)

    def take(self, most: int) -> list[Group]:
        """Remove and return the groups that have waited longest, at most so many."""
        return [self._groups.popleft() for _ in range(min(most, len(self._groups)))]

    def state(self) -> list[list[dict[str, Any]]]:
        """All groups, in JSON's types, as far as the metadata of the prompts is made of them."""
        return [[sample.to_dict() for sample in group] for group in self._groups]

    def load_state(self, state: Iterable[Iterable[Mapping[str, Any]]]) -> None:
        """Hold what `state` gave, and nothing else.

        Raises:
            DataError: it is no such state; the buffer stays as it was.
        """
        try:
            groups = [tuple(map(Sample.from_dict, group)) for group in state]
        except (TypeError, ValueError, DataError) as error:
            raise DataError(f"The saved buffer of unfinished groups is damaged: {error}.") from None
        self._groups.clear()
        self.put(groups)
