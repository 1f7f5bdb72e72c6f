"""`PromptStream`: the endless, seeded, resumable order in which training reads the rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from kit.data.prompts import PromptRow, PromptSet
from kit.errors import DataError


class PromptStream:
    """Rows of a set, epoch after epoch, each epoch in its own order if `shuffle` is true.

    The order of an epoch follows from the seed and the epoch's number alone, so a state is two
    numbers and a continued stream gives the rows that an unbroken one would have given.
    """

    def __init__(
        self,
        prompts: PromptSet,
        seed: int = 0,
        shuffle: bool = True,
        keep: Callable[[PromptRow], bool] | None = None,
    ) -> None:
        """Begin at the first row; rows for which `keep` is false are passed over."""
        if not len(prompts):
            raise DataError("A stream needs at least one prompt.", fix="check data.source.")
        self._prompts, self._seed, self._shuffle, self._keep = prompts, seed, shuffle, keep
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    @property
    def epoch(self) -> int:
        """Number of completed passes over the set."""
        return self._epoch

    def next(self, n: int) -> list[PromptRow]:
        """Take the next `n` rows; after the last row of the set the next epoch begins."""
        if n < 0:
            raise DataError(f"A stream cannot give {n} rows.", fix="ask for 0 or more.")
        rows: list[PromptRow] = []
        passed_over = 0
        while len(rows) < n:
            row = self._prompts.rows[self._order[self._position]]
            self._position += 1
            if self._position == len(self._order):
                self._start(self._epoch + 1, 0)
            if self._keep is None or self._keep(row):
                rows.append(row)
                passed_over = 0
            elif (passed_over := passed_over + 1) >= len(self._order):
                raise DataError(
                    f"None of the {len(self._order)} rows can be used: all are left out.",
                    fix="raise model.context_length, lower rollout.max_response_len, or give other "
                    "prompts.",
                )
        return rows

    def peek(self, n: int) -> list[PromptRow]:
        """Rows that the next calls of `next` will return, without taking them."""
        here = self._epoch, self._position, self._order
        try:
            return self.next(n)
        finally:
            self._epoch, self._position, self._order = here

    def state(self) -> dict[str, Any]:
        """Position of the stream, in JSON's types; `load_state` takes it."""
        return {
            "name": self._prompts.name,
            "rows": len(self._prompts),
            "fingerprint": self._prompts.fingerprint,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "epoch": self._epoch,
            "position": self._position,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from the position that `state` returned.

        Raises DataError for a state of other data or a damaged one; the stream is then unchanged.
        """
        if missing := sorted(self.state().keys() - state.keys()):
            raise DataError(f"This is no state of a prompt stream: it lacks {', '.join(missing)}.")
        if state["fingerprint"] != self._prompts.fingerprint:
            raise DataError(
                f"The saved position belongs to other prompts: {state['name']!r} with "
                f"{state['rows']} rows; these are {self._prompts.name!r} with "
                f"{len(self._prompts)} rows.",
                why="Either another source is configured, or the rows changed since.",
                fix="set data.source and the seed to what they were, or start a new run.",
            )
        epoch, position = state["epoch"], state["position"]
        if not (isinstance(epoch, int) and epoch >= 0 and position in range(len(self._prompts))):
            raise DataError(
                f"The saved position is damaged: epoch {epoch!r}, row {position!r} of "
                f"{len(self._prompts)}."
            )
        self._seed, self._shuffle = state["seed"], state["shuffle"]
        self._start(epoch, position)

    def _start(self, epoch: int, position: int) -> None:
        self._epoch, self._position = epoch, position
        self._order = self._order_of(epoch)

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._seed} {epoch}").shuffle(order)
        return order
