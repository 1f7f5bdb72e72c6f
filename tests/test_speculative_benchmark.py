"""The drafts' benchmark: how responses are compared, and a head that learns from its text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.gpu_parts.comparison import alike, chi_square, differences
from benchmarks.gpu_parts.predictable import train_head
from kit.models.heads.files import problem_of
from kit.tiny import MODEL_DIR


def test_responses_that_part_are_told_with_where_and_how_closely() -> None:
    plain = {"tokens": [[1, 2, 3], [1, 2, 3]], "log_probs": [[-1.0, -1.0, -1.0]] * 2}
    drafts = {"tokens": [[1, 2, 3], [1, 5, 3]], "log_probs": [[-1.0, -1.25, -1.0]] * 2}
    found = differences(plain, drafts)
    assert (found["same"], found["of"], found["tokens"]) == (1, 2, 6)
    assert found["gaps"] == [[1, 0.25]]
    begin = [7] * 64
    assert alike([begin, begin], [begin, [*begin[:20], 8]]) == {16: 2, 64: 1, 256: 1}


def test_frequencies_are_compared_with_probabilities() -> None:
    likely = [[[1], 60, math.log(0.6)], [[2], 39, math.log(0.39)], [[3], 1, math.log(0.01)]]
    assert chi_square(likely, likely) == pytest.approx(
        {"cells": 2, "chi_square": 0.0, "p": 1.0, "rest": 1, "expected": 1.0}
    )
    other = [[[1], 30, 0.0], [[2], 70, 0.0]]
    expected = 30**2 / 60 + 31**2 / 39
    found = chi_square(likely, other)
    assert found["chi_square"] == pytest.approx(expected)
    assert found["p"] == pytest.approx(math.erfc(math.sqrt(expected / 2)))


@pytest.mark.slow
def test_a_head_learns_from_the_text_of_the_benchmark(tmp_path: Path) -> None:
    losses: list[str] = []
    sizes = {"rows": 2, "length": 48, "rate": 3e-3}
    first = train_head(MODEL_DIR, tmp_path, "cpu", steps=1, say=losses.append, **sizes)  # type: ignore[arg-type]
    last = train_head(MODEL_DIR, tmp_path, "cpu", steps=30, say=losses.append, **sizes)  # type: ignore[arg-type]
    assert last < first - 0.1
    assert not problem_of(tmp_path, MODEL_DIR)
