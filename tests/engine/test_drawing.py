"""What a GPU's kernel draws, in Triton's interpreter; on a GPU see `test_drafts_gpu`."""

from __future__ import annotations

import pytest

from tests.engine.interpreted import interpreted


def test_a_gpus_kernel_draws_by_seed_and_place_as_the_formula_says() -> None:
    greedy, warm, formula, alone, broken = interpreted("drawing")
    assert greedy[1] == "True"
    assert max(float(greedy[2]), float(warm[1])) < 1e-5
    assert formula[1] == "True"
    assert int(formula[2]) > 1  # tokens: rows are not all alike
    assert alone[1] == "True"
    assert broken[1:3] == ["True", "True"]  # NaN in its own row, and in no other
    assert int(broken[3]) < 150


@pytest.mark.slow
def test_a_gpus_kernel_draws_by_the_probabilities() -> None:
    ((_, chi_square, never),) = interpreted("drawing", "draws")
    assert float(chi_square) < 22.5  # six degrees of freedom: exceeded once in a thousand
    assert never == "0"  # of log-prob minus infinity
