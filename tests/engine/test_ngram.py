"""Drafts from n-grams."""

from __future__ import annotations

import numpy as np

from kit.engine.drafts.ngram import NgramCorpus


def chains(corpus: NgramCorpus, *rows: list[int], first: int = 0) -> list[list[int]]:
    names = [f"r{first + number}" for number in range(len(rows))]
    tokens, masks = corpus.batch_get(names, rows, [len(row) for row in rows])
    n = len(tokens) // len(rows)
    assert masks.reshape(len(rows), n, n).tolist() == [np.tri(n).tolist()] * len(rows)
    return tokens.reshape(len(rows), n).tolist()  # type: ignore[no-any-return]


def test_a_chain_goes_on_as_the_longest_known_ending_did_last() -> None:
    corpus = NgramCorpus(draft_token_num=4)
    assert chains(corpus, [5, 6, 7, 8, 5, 6]) == [[6, 7, 8, 5]]
    corpus.batch_put([[5, 6, 9, 1]])  # after 5 6 something else came last
    assert chains(corpus, [2, 5, 6], first=1) == [[6, 9, 1, 1]]
    # Seen with more before it, the first continuation is known still.
    assert chains(corpus, [8, 5, 6, 7, 8, 5, 6, 7], first=2)[0][:3] == [7, 8, 5]


def test_requests_help_each_other_and_are_forgotten() -> None:
    corpus = NgramCorpus(draft_token_num=3)
    assert chains(corpus, [1, 2, 3], [9, 1, 2]) == [[3, 3, 3], [2, 3, 3]]
    corpus.erase_match_state(["r0", "r1"])
    corpus.reset()
    assert chains(corpus, [7, 1], first=5) == [[1, 1, 1]]
