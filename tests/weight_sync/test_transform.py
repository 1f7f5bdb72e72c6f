"""Weights made worse on purpose: how much, and the same on both sides that look at them."""

from __future__ import annotations

import torch

from kit.weight_sync.transform import Disturbance, rounded


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 1024, generator=torch.Generator().manual_seed(seed)) * 0.02


def test_rounding_puts_each_row_on_a_grid_that_reaches_its_largest_value() -> None:
    weight = torch.tensor([[1.0, 0.4, -0.9], [0.1, 0.0, -0.02], [0.0, 0.0, 0.0]])
    # Three bits: steps of a third of the largest.
    expected = torch.tensor([[1.0, 1 / 3, -1.0], [0.1, 0.0, -0.1 / 3], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(rounded(weight, 3), expected)
    torch.testing.assert_close(rounded(weight, 16), weight, rtol=0, atol=1e-4)


def test_noise_is_as_large_as_asked_against_each_row() -> None:
    weight = matrix() * torch.linspace(0.1, 10, 64)[:, None]
    change = Disturbance(noise=0.5).of("q_proj", weight, 1) - weight
    share = change.square().mean(-1).sqrt() / weight.square().mean(-1).sqrt()
    assert 0.45 < share.min() < share.max() < 0.55  # of 1,024 numbers a row


def test_noise_is_drawn_anew_for_each_version_and_matrix_and_again_the_same_for_one() -> None:
    noisy, weight = Disturbance(noise=0.5, seed=3), matrix()
    assert torch.equal(noisy.of("a", weight, 1), noisy.of("a", weight, 1))
    for other in (
        noisy.of("a", weight, 2),
        noisy.of("b", weight, 1),
        Disturbance(noise=0.5, seed=4).of("a", weight, 1),
    ):
        assert not torch.equal(noisy.of("a", weight, 1), other)


def test_only_matrices_are_touched() -> None:
    disturbance, norm = Disturbance(bits=3, noise=0.5), torch.rand(64)
    assert torch.equal(disturbance.of("norm", norm, 1), norm)
    assert not torch.equal(disturbance.of("q_proj", matrix(), 1), matrix())
    assert torch.equal(Disturbance().of("q_proj", matrix(), 1), matrix())
