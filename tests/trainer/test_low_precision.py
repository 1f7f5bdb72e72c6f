"""A trainer with quantised weights: what it computes, learns, keeps and sends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kit.config import QuantizationConfig
from kit.errors import ModelError
from kit.models.low_precision import is_quantized, scheme_of
from kit.models.sharding import whole
from kit.operators.low_precision import Scheme
from kit.tiny import MODEL_DIR
from kit.trainer.actor import Trainer
from kit.weight_sync.transport import ReceiveBuffer
from tests.trainer.test_estimators import WITH_CRITIC, valued
from tests.trainer.trainers import PLAIN, Make, backend, batch, make

__all__ = ["make"]
FP8 = QuantizationConfig(method="fp8")
INT4 = QuantizationConfig(method="int4", group_size=64)
BOTH = pytest.mark.parametrize("how", [FP8, INT4], ids=["fp8", "int4"])


def masters(trainer: Trainer) -> dict[str, torch.Tensor]:
    named = backend(trainer).policy.model.named_parameters()
    return {name: whole(value).detach().clone() for name, value in named}


def sent(trainer: Trainer) -> dict[str, torch.Tensor]:
    handle = trainer.export_weights()
    assert handle is not None
    flat = ReceiveBuffer().receive(handle)
    return {entry.name: entry.view(flat).clone() for entry in handle.entries}


def by_hand(scheme: Scheme) -> Any:
    """Transformers' own model, its weights exchanged and its activations rounded by hooks."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    )

    def rounded(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        x = inputs[0]
        parts = []
        for part in x.split(128, dim=-1):
            scale = part.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 448
            parts.append((part / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale)
        return (torch.cat(parts, dim=-1),)

    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                value = scheme.read(*scheme.quantize(module.weight), torch.float32)
                module.weight.data.copy_(value)
                if scheme.method == "fp8":
                    module.register_forward_pre_hook(rounded)
    return model


@BOTH
def test_it_computes_the_model_that_codes_and_scales_stand_for(
    make: Make, how: QuantizationConfig
) -> None:
    trainer, model = make(quantization=how), by_hand(scheme_of(how))
    asked = batch()
    found = trainer.log_probs(asked.tokens, asked.response_lengths)
    plain = make().log_probs(asked.tokens, asked.response_lengths)
    for row, tokens, length, other in zip(
        found, asked.tokens, asked.response_lengths, plain, strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[0] / 0.8
        wanted = logits.log_softmax(-1)[:-1].gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(row), wanted[-length:], rtol=0, atol=2e-4)
        assert row != other


@BOTH
def test_it_learns_in_float32_and_sends_codes_of_what_it_has_learned(
    make: Make, how: QuantizationConfig
) -> None:
    trainer = make(quantization=how, **PLAIN)
    before = masters(trainer)
    trainer.update(batch(), "one")
    after, there, scheme = masters(trainer), sent(trainer), scheme_of(how)
    for name, value in after.items():
        assert value.dtype is torch.float32
        assert not torch.equal(value, before[name]), name
        if is_quantized(name):
            codes, scales = scheme.quantize(value)
            # Of bytes: a code may be NaN, which equals nothing.
            assert torch.equal(there.pop(name).view(torch.uint8), codes.view(torch.uint8))
            assert torch.equal(there.pop(f"{name}_scale"), scales)
        else:
            assert torch.equal(there.pop(name), value)
    assert not there


@BOTH
def test_packing_recomputing_and_compiling_change_no_update(
    make: Make, how: QuantizationConfig
) -> None:
    def learned(**settings: Any) -> torch.Tensor:
        trainer = make(quantization=how, **settings, **PLAIN)
        trainer.update(batch(), "one")
        return torch.cat([value.flatten() for value in masters(trainer).values()])

    usual = learned()
    start = torch.cat([value.flatten() for value in masters(make(quantization=how)).values()])
    size = (usual - start).norm()
    for other in ({"max_tokens": 20}, {"recompute": "full"}, {"recompute": "selective"}):
        assert (learned(**other) - usual).norm() < 2e-3 * size, other


@pytest.mark.slow
@BOTH
def test_compiled_layers_give_the_same_update(make: Make, how: QuantizationConfig) -> None:
    weights = []
    for compiles in (False, True):
        trainer = make(quantization=how, compiles=compiles, **PLAIN)
        trainer.update(batch(), "one")
        weights.append(torch.cat([value.flatten() for value in masters(trainer).values()]))
    start = torch.cat([value.flatten() for value in masters(make(quantization=how)).values()])
    assert (weights[0] - weights[1]).norm() < 2e-3 * (weights[0] - start).norm()


@BOTH
def test_reference_and_critic_are_quantised_in_the_same_way(
    make: Make, how: QuantizationConfig
) -> None:
    trainer = make(quantization=how, kl_loss_coef=0.1, **WITH_CRITIC)
    asked = batch().tokens, batch().response_lengths
    assert trainer.log_probs(*asked) == trainer.log_probs(*asked, of="reference")
    seen: dict[str, torch.Tensor] = {}
    for name in ("policy", "critic"):
        model: Any = backend(trainer).learners[name].model
        body = model.model.model if name == "policy" else model.backbone
        body.layers[1].register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.update({name: output})
        )
    trainer.log_probs(*asked)
    trainer.values(*asked)
    assert torch.equal(seen["policy"], seen["critic"])
    trainer.update(valued(trainer, batch()), "one")
    assert trainer.log_probs(*asked) != trainer.log_probs(*asked, of="reference")
    assert trainer.values(*asked)[0] != [0.0] * batch().response_lengths[0]


@BOTH
def test_a_snapshot_brings_back_every_bit(make: Make, how: QuantizationConfig) -> None:
    trainer = make(quantization=how, **PLAIN)
    trainer.update(batch(), "one")
    trainer.snapshot("here")
    before, there = trainer.probe("digest"), sent(trainer)
    first = trainer.update(batch(1), "two")[0]
    trainer.restore("here")
    assert trainer.probe("digest") == before
    assert all(
        torch.equal(value.view(torch.uint8), there[name].view(torch.uint8))
        for name, value in sent(trainer).items()
    )
    assert trainer.update(batch(1), "two")[0] == first


@BOTH
def test_weights_that_are_not_finite_are_not_sent(make: Make, how: QuantizationConfig) -> None:
    trainer = make(quantization=how)
    weights = dict(backend(trainer).policy.model.named_parameters())
    with torch.no_grad():
        weights["model.layers.2.mlp.up_proj.weight"].data.view(-1)[7] = torch.inf
    with pytest.raises(
        ModelError, match=r"2\.mlp\.up_proj\.weight has numbers that are not finite"
    ):
        trainer.export_weights()
