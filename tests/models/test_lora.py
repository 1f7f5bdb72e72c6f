"""Layers with adapters: recomputed and compiled they give the same numbers and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kit.config import LoraConfig
from kit.errors import ModelError
from kit.models import attention, compile, four_bit, lora
from kit.models.packing import Packed
from kit.models.policy import Policy, load
from kit.tiny import MODEL_DIR
from tests.cases import slow
from tests.models.test_compile import BATCHES


def adapted(*, in_4_bits: bool = False) -> Policy:
    """The tiny model with adapters that do something."""
    policy = load(str(MODEL_DIR))
    inner: Any = policy.model
    lora.inject(inner, LoraConfig(r=4), seed=0)
    if in_4_bits:
        four_bit.quantize(inner.model.layers, torch.device("cpu"), torch.float32)
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


@pytest.mark.parametrize("in_4_bits", [False, True])
@pytest.mark.parametrize("level", ["full", "selective", *slow("alternating")])
def test_what_is_recomputed_has_the_same_gradients(
    level: compile.Recompute, in_4_bits: bool
) -> None:
    policy = adapted(in_4_bits=in_4_bits)
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, level)
    policy.train()
    plain = results(adapted(in_4_bits=in_4_bits), BATCHES[0])
    for got, wanted in zip(results(policy, BATCHES[0]), plain, strict=True):
        assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "in_4_bits"), [("none", False), ("full", False), ("none", True)])
def test_compiled_layers_give_the_same_numbers_with_adapters_and_without(
    monkeypatch: pytest.MonkeyPatch, level: compile.Recompute, in_4_bits: bool
) -> None:
    from torch._dynamo.utils import counters

    expected = [results(adapted(in_4_bits=in_4_bits), packed) for packed in BATCHES]
    monkeypatch.setattr(attention, "layout", attention.gathered)
    monkeypatch.setattr(attention, "attend_on_cpu", attention.attend_on_gpu)
    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    policy = adapted(in_4_bits=in_4_bits)
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, level)
    compile.compile_layers(inner.model.layers)
    policy.train()
    for packed, values in zip(BATCHES, expected, strict=True):
        for got, wanted in zip(results(policy, packed), values, strict=True):
            assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # Shared prompts or none; of each with adapters and without, and what is computed again.
    assert counters["stats"]["unique_graphs"] == (6 if level == "full" else 4)
    torch._dynamo.reset()


def test_the_backward_pass_keeps_no_weight_that_was_read() -> None:
    policy, kept = adapted(in_4_bits=True), []
    shapes = {(each.out_features, each.in_features) for _, each in four_bit.quantized(policy)}
    shapes |= {shape[::-1] for shape in shapes}

    def look(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(look, lambda tensor: tensor):
        logp, _ = policy(BATCHES[0], 1.0)
        logp.sum().backward()
    assert kept
    assert not shapes & set(kept)


def test_a_weight_that_blocks_do_not_divide_is_refused() -> None:
    layer = torch.nn.ModuleDict({"odd": torch.nn.Linear(5, 3).requires_grad_(False)})
    with pytest.raises(ModelError, match=r"odd has a weight of \(3, 5\).*multiple of 64"):
        four_bit.quantize([layer], torch.device("cpu"), torch.float32)
