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


def test_sglangs_sampler_draws_by_seed_and_does_the_rest_itself() -> None:
    plain, greedy, more, narrow, widened, both = interpreted("sampler")
    assert plain[-1] == "True"
    assert greedy[1] == "True"
    for line, place in ((plain, -2), (greedy, 2), (more, 2)):
        assert float(line[place]) < 1e-5  # of the log-probs
    assert more[1] == "2"  # log-probs of further tokens
    assert narrow[1] == "True"
    assert max(map(float, widened[1:])) < 1e-5
    assert both[1:] == ["2", "True"]  # either of two tokens, by the seed
