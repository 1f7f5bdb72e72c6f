"""The drafts' benchmark: how responses are compared, and a head that learns from its text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks.gpu_parts.comparison import alike, chi_square, differences, shown
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


def test_rows_are_told_beside_plain_decoding() -> None:
    plain = {"rate": 100.0, "passes": 1.0, "drafted": 0.0, "right": []}
    always = {"rate": 150.0, "passes": 2.25, "drafted": 1.0, "right": [0.75, 0.5], "estimate": 1.25}
    rows = shown("decoded/8/0", {"plain": plain, "always": always}).splitlines()
    assert rows[0] == "decoded/8/0, plain: 100 tokens/s, 1.00 x"
    assert "always: 150 tokens/s, 1.50 x, 2.25 tokens a pass" in rows[1]
    assert "estimated 1.25 x" in rows[1]
    assert rows[1].endswith("with 1, 2, … drafted about 1.75, 2.25 a pass")
    assert "always: 150 tokens/s, nan x" in shown("decoded/8/0", {"always": always})
    syncs = {"plain": [0.05, 0.04, 0.9], "always": [0.06]}
    assert "always: median 60.0 ms, 1.20 x" in shown("syncs", syncs)


@pytest.mark.slow
def test_a_head_learns_from_the_text_of_the_benchmark(tmp_path: Path) -> None:
    losses: list[str] = []
    sizes = {"rows": 2, "length": 48, "rate": 3e-3}
    first = train_head(MODEL_DIR, tmp_path, "cpu", steps=1, say=losses.append, **sizes)  # type: ignore[arg-type]
    last = train_head(MODEL_DIR, tmp_path, "cpu", steps=30, say=losses.append, **sizes)  # type: ignore[arg-type]
    assert last < first - 0.1
    assert not problem_of(tmp_path, MODEL_DIR)
