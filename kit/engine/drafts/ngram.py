"""Drafts from what was written before, without a model: n-grams of the requests that are running.

SGLang's own corpus is C++, which it compiles when it starts; machines without a GPU may have no
compiler. This one drafts a chain: the token that last followed the longest ending of the text that
was seen before, and so on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

LONGEST = 8
"""Most tokens of an ending that is looked for."""
CAPACITY = 1 << 20
"""Most endings that are kept; all are forgotten when there are more."""


class NgramCorpus:
    """Stands for SGLang's `NgramCorpus`, as its n-gram worker calls it."""

    def __init__(self, **settings: Any) -> None:
        """Take `draft_token_num` of SGLang's settings: the nodes of a chain.

        The first of them is no guess, but the last token of the text.
        """
        self._nodes = int(settings["draft_token_num"])
        self._next: dict[tuple[int, ...], int] = {}
        self._known: set[str] = set()
        """Requests whose prompts have been read."""

    def reset(self) -> None:
        """Forget all text."""
        self._next.clear()
        self._known.clear()

    def batch_put(self, rows: Sequence[Sequence[int]]) -> None:
        """Read the ends of some texts, of which no more than a chain is new."""
        for row in rows:
            self._read(row, len(row) - self._nodes)
        if len(self._next) > CAPACITY:
            self.reset()

    def _read(self, row: Sequence[int], first: int) -> None:
        for end in range(max(1, first), len(row)):
            for length in range(1, min(end, LONGEST) + 1):
                self._next[tuple(row[end - length : end])] = row[end]

    def batch_get(
        self, request_ids: Sequence[str], rows: Sequence[Sequence[int]], lengths: Sequence[int]
    ) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """A chain for each text that ends as `rows` says: (tokens (B * n), masks (B * n * n))."""
        tokens: list[int] = []
        for request, row in zip(request_ids, rows, strict=True):
            if request not in self._known:
                self._known.add(request)
                self._read(row, 1)
            chain = list(row[-LONGEST:])
            start = len(chain) - 1
            while len(chain) < start + self._nodes:
                chain.append(self._guess(chain))
            tokens += chain[start:]
        mask = np.tri(self._nodes, dtype=np.int64)
        return np.array(tokens, dtype=np.int64), np.tile(mask.reshape(-1), len(rows))

    def _guess(self, text: list[int]) -> int:
        for length in range(min(LONGEST, len(text)), 0, -1):
            found = self._next.get(tuple(text[-length:]))
            if found is not None:
                return found
        return text[-1]

    def synchronize(self) -> None:
        """Nothing is done elsewhere that one could wait for."""

    def erase_match_state(self, request_ids: Sequence[str]) -> None:
        """Forget that these requests were seen; their text stays."""
        self._known.difference_update(request_ids)
