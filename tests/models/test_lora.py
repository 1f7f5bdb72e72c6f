"""Layers with adapters: recomputed and compiled they give the same numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kit.config import LoraConfig
from kit.models import attention, compile, lora
from kit.models.packing import Packed
from kit.models.policy import Policy, load
from kit.tiny import MODEL_DIR
from tests.cases import slow
from tests.models.test_compile import BATCHES


def adapted() -> Policy:
    """The tiny model with adapters that do something."""
    policy = load(str(MODEL_DIR))
    lora.inject(policy.model, LoraConfig(r=4), seed=0)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in policy.named_parameters():
            if ".lora_B." in name:
                value.normal_(std=0.05)
    return policy


def results(policy: Policy, packed: Packed) -> list[torch.Tensor]:
    """Log-probs with adapters and without, and the gradient of each."""
    policy.zero_grad()
    logp, _ = policy(packed, 1.0)
    logp.sum().backward()
    with torch.no_grad(), lora.switched_off():
        without, _ = policy(packed, 1.0)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    gradients = [p.grad.clone() for p in trained if p.grad is not None]
    assert len(gradients) == len(trained) == 56
    return [logp.detach(), without, *gradients]


@pytest.mark.parametrize("level", ["full", "selective", *slow("alternating")])
def test_what_is_recomputed_has_the_same_gradients(level: compile.Recompute) -> None:
    policy = adapted()
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, level)
    policy.train()
    for got, wanted in zip(
        results(policy, BATCHES[0]), results(adapted(), BATCHES[0]), strict=True
    ):
        assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["none", "full"])
def test_compiled_layers_give_the_same_numbers_with_adapters_and_without(
    monkeypatch: pytest.MonkeyPatch, level: compile.Recompute
) -> None:
    from torch._dynamo.utils import counters

    expected = [results(adapted(), packed) for packed in BATCHES]
    monkeypatch.setattr(attention, "layout", attention.gathered)
    monkeypatch.setattr(attention, "attend_on_cpu", attention.attend_on_gpu)
    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    policy = adapted()
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, level)
    compile.compile_layers(inner.model.layers)
    policy.train()
    for packed, values in zip(BATCHES, expected, strict=True):
        for got, wanted in zip(results(policy, packed), values, strict=True):
            assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # Shared prompts or none; of each the first layer, before which nothing has a gradient, the
    # others, and all of them without adapters.
    assert counters["stats"]["unique_graphs"] == 6
    torch._dynamo.reset()
