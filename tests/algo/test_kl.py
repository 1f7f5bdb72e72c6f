"""Estimators of the KL divergence: values by hand, and the laws they obey."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import tensor

from kit.algo.kl import KlKind, approx_kl

KINDS: tuple[KlKind, ...] = get_args(KlKind)
logps = st.floats(-15.0, 0.0)
pairs = st.lists(st.tuples(logps, logps), min_size=1, max_size=20)


def double(values: list[float]) -> torch.Tensor:
    return tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("k1", math.log(2)),
        ("k2", math.log(2) ** 2 / 2),
        ("k3", 0.5 - 1 + math.log(2)),
        ("low_var_kl", 0.5 - 1 + math.log(2)),
    ],
)
def test_a_token_twice_as_likely_as_under_the_reference_has_the_value_worked_out_by_hand(
    kind: KlKind, value: float
) -> None:
    kl = approx_kl(double([math.log(0.5)]), double([math.log(0.25)]), kind)
    assert kl.item() == pytest.approx(value, abs=1e-15)


@given(pairs)
def test_k3_and_k2_are_never_negative_and_zero_only_where_both_agree(
    pairs: list[tuple[float, float]],
) -> None:
    logp, ref = double([p for p, _ in pairs]), double([r for _, r in pairs])
    for kind in ("k2", "k3", "low_var_kl"):
        assert (approx_kl(logp, ref, kind) >= 0).all()
        assert (approx_kl(logp, logp, kind) == 0).all()
    far = (logp - ref).abs() > 1e-3
    assert (approx_kl(logp, ref, "k3")[far] > 0).all()


def test_k3_is_never_negative_in_float32_where_both_nearly_agree() -> None:
    logp = torch.linspace(-1, 0, 10_001)
    nearly = logp * (1 + 1e-6)
    assert (approx_kl(logp, nearly, "k3") >= -1e-12).all()


@given(st.lists(st.floats(0.05, 1.0), min_size=2, max_size=6), st.data())
def test_k1_and_k3_have_the_true_divergence_as_their_mean(
    weights: list[float], data: st.DataObject
) -> None:
    size = len(weights)
    other = data.draw(st.lists(st.floats(0.05, 1.0), min_size=size, max_size=size))
    p, q = double(weights) / sum(weights), double(other) / sum(other)
    true = (p * (p / q).log()).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p * approx_kl(p.log(), q.log(), kind)).sum(), true)


@given(pairs, st.sampled_from(KINDS))
def test_the_gradient_is_that_of_the_plain_formula(
    pairs: list[tuple[float, float]], kind: KlKind
) -> None:
    ref = double([r for _, r in pairs])
    logp, plain = (double([p for p, _ in pairs]).requires_grad_() for _ in range(2))
    approx_kl(logp, ref, kind).sum().backward()
    d = plain - ref
    formula = {"k1": d, "k2": d**2 / 2, "k3": torch.exp(-d) - 1 + d}
    formula["low_var_kl"] = formula["k3"].clamp(-10, 10)
    formula[kind].sum().backward()
    torch.testing.assert_close(logp.grad, plain.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_importance_ratio_multiplies_the_estimate(kind: KlKind) -> None:
    logp, ref, ratio = double([-1.0, -2.0]), double([-1.5, -1.0]), double([0.5, 3.0])
    weighted = approx_kl(logp, ref, kind, ratio)
    torch.testing.assert_close(weighted, ratio * approx_kl(logp, ref, kind))


def test_low_var_kl_stays_within_ten_whatever_it_is_given() -> None:
    logp, ref = double([-1e4, -3.0, 0.0]), double([0.0, 0.0, -1e4])
    kl = approx_kl(logp, ref, "low_var_kl")
    assert kl.tolist() == pytest.approx([10.0, 10.0, 10.0])
    # The ratio comes before the last clamp.
    assert approx_kl(logp, ref, "low_var_kl", double([5.0] * 3)).max() == 10.0
    assert approx_kl(double([-0.5]), double([0.0]), "low_var_kl", double([9.0])).item() == (
        pytest.approx(9 * (math.exp(0.5) - 1.5))
    )


def test_an_unknown_kind_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'k4' is none of k1, k2, k3, low_var_kl"):
        approx_kl(double([0.0]), double([0.0]), "k4")  # type: ignore[arg-type]
