"""Adapters in the trainer: what they compute, what they change, and what stays as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kit.config import LoraConfig
from kit.errors import ModelError
from kit.models.four_bit import quantized
from kit.models.sharding import local_bytes, whole
from kit.models.source import stored_parameters
from kit.operators import nf4
from kit.tiny import MODEL_DIR, MOE_DIR
from kit.trainer.actor import Trainer
from kit.weight_sync.transport import ReceiveBuffer
from tests.checkpoint.test_export import response_log_probs
from tests.small_models import make_model
from tests.trainer.test_estimators import WITH_CRITIC, valued
from tests.trainer.trainers import PLAIN, Make, backend, batch, make, weights

__all__ = ["make"]  # a fixture
RANK_4 = LoraConfig(r=4, lora_alpha=8)
IN_4_BITS = RANK_4.model_copy(update={"load_in_4bit": True})
FAST = {"learning_rate": 0.01}


def log_probs(trainer: Trainer, of: str = "policy") -> list[list[float]]:
    given = batch()
    return trainer.log_probs(given.tokens, given.response_lengths, of)


def frozen(trainer: Trainer) -> dict[str, bytes]:
    """Every bit of what no update may change."""
    policy = backend(trainer).policy
    kept = {name: p for name, p in policy.named_parameters() if not p.requires_grad}
    kept |= {
        f"{name} {i}": p for name, layer in quantized(policy) for i, p in enumerate(layer.parts)
    }
    return {name: local_bytes(p).numpy().tobytes() for name, p in kept.items()}


def updated(trainer: Trainer, steps: int = 2) -> Trainer:
    for step in range(steps):
        trainer.update(batch(step), f"update {step}")
    return trainer


def test_training_begins_with_the_model_as_it_is_to_the_bit(make: Make) -> None:
    full = make()
    expected, sent = log_probs(full), weights(full).clone()
    trainer = make(lora=RANK_4)
    assert log_probs(trainer) == expected
    assert torch.equal(weights(trainer).view(torch.int32), sent.view(torch.int32))


@pytest.mark.parametrize("lora", [RANK_4, IN_4_BITS])
def test_only_adapters_are_trained_and_kept(make: Make, lora: LoraConfig) -> None:
    trainer = make(lora=lora, **FAST)
    before = frozen(trainer)
    trained = [value.numel() for _, value in trainer.backend.named_trained()]
    updated(trainer)
    assert frozen(trainer) == before
    names = trainer.backend.state_tensors()
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    # Parameters and the two moments of each, and a count of steps.
    assert trainer.state_bytes() == 12 * sum(trained) + 4 * len(trained)


def test_a_step_is_that_of_peft_on_transformers(make: Make) -> None:
    from peft import LoraConfig as Peft
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    trainer = make(lora=RANK_4, **PLAIN)
    start = {n: whole(p).detach().clone() for n, p in trainer.backend.named_trained()}
    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    model = get_peft_model(base, Peft(r=4, lora_alpha=8, target_modules="all-linear"))
    inside = dict(base.named_parameters())
    for name, value in start.items():
        inside[name].data.copy_(value)
    given, optimizer = batch(), torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad],
        lr=0.1, betas=(0.9, 0.98), eps=1.0, weight_decay=0.0,
    )  # fmt: skip
    for row, count, mask, advantage in zip(
        given.tokens, given.response_lengths, given.loss_masks, given.advantages, strict=True
    ):
        logp = (model(torch.tensor([row])).logits[0] / 0.8).log_softmax(-1)
        places = range(len(row) - count, len(row))
        own = torch.stack([logp[place - 1, row[place]] for place in places])
        active = torch.tensor(mask)
        (-(advantage * own * active).sum() / active.sum() / len(given)).backward()
    optimizer.step()
    trainer.update(given, "a")
    moved = 0.0
    for name, value in trainer.backend.named_trained():
        torch.testing.assert_close(whole(value), inside[name], rtol=0, atol=1e-6)
        moved = max(moved, float((whole(value).detach() - start[name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.parametrize("lora", [RANK_4, IN_4_BITS])
def test_without_its_adapter_the_policy_is_its_reference_to_the_bit(
    make: Make, lora: LoraConfig
) -> None:
    trainer = make(lora=lora, kl_loss_coef=0.1, **FAST)
    start = log_probs(trainer)
    (first,), _ = trainer.update(batch(), "a")
    (second,), _ = trainer.update(batch(), "b")
    assert backend(trainer).reference is None
    assert first["train/kl_loss"] == 0.0
    assert second["train/kl_loss"] > 1e-4
    assert log_probs(trainer) != start
    assert log_probs(trainer, "reference") == start


def test_merged_weights_compute_what_weight_and_adapter_compute(make: Make) -> None:
    trainer = updated(make(lora=LoraConfig(r=4, use_rslora=True), learning_rate=2e-3))
    expected = log_probs(trainer)
    handle = trainer.export_weights()
    assert handle is not None
    flat = weights(trainer).view(torch.uint8)
    merged = {entry.name: entry.view(flat) for entry in handle.entries}
    start = dict(make().backend.module().named_parameters())
    assert merged.keys() == start.keys()
    changed = {n for n, value in merged.items() if not torch.equal(value, whole(start[n]))}
    assert {name.split(".")[-2] for name in changed} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip
    full = make()
    for name, value in full.backend.module().named_parameters():
        whole(value).data.copy_(merged[name])
    for row, other in zip(expected, log_probs(full), strict=True):
        assert row == pytest.approx(other, abs=1e-5)
    assert log_probs(full) != log_probs(make())


@pytest.mark.parametrize("lora", [RANK_4, IN_4_BITS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_shared_operators_give_the_bits_of_the_merged_weights(
    make: Make, dtype: str, lora: LoraConfig
) -> None:
    exact: dict[str, Any] = {"dtype": dtype, "true_on_policy": True, **FAST}
    trainer = updated(make(lora=lora, **exact))
    handle = trainer.export_weights()
    assert handle is not None
    expected, digests = log_probs(trainer), trainer.probe("outputs", batch().tokens[0])
    flat = weights(trainer).view(torch.uint8).clone()
    full = make(**exact)
    with torch.no_grad():
        names = dict(full.backend.module().named_parameters())
        for entry in handle.entries:
            whole(names[entry.name]).copy_(entry.view(flat))
    assert log_probs(full) == expected
    found = full.probe("outputs", batch().tokens[0])
    assert {name: digests[name] for name in found} == found


def test_in_bfloat16_adapters_are_stepped_in_float32_beside_a_base_of_half_the_size(
    make: Make,
) -> None:
    trainer = updated(make(lora=RANK_4, dtype="bfloat16", **FAST))
    kinds = {(p.requires_grad, p.dtype) for p in backend(trainer).policy.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert 0 < trainer.probe("merge_error") < 0.5
    assert updated(make(lora=RANK_4, **FAST)).probe("merge_error") < 1e-4


def test_how_samples_are_packed_changes_no_adapter(make: Make) -> None:
    results = []
    for limit in (1, 20, 100_000):
        trainer = make(lora=RANK_4, max_tokens=limit, **PLAIN | {"kl_loss_coef": 0.1})
        updated(trainer)
        results.append(weights(trainer).clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_in_4_bits_is_the_model_that_is_computed_sent_and_exported(
    make: Make, tmp_path: Path, dtype: str
) -> None:
    before = dict(make(dtype=dtype).backend.module().named_parameters())
    values = {name: whole(value).detach().clone() for name, value in before.items()}
    trainer = make(lora=IN_4_BITS, dtype=dtype, **FAST)
    start = sent(trainer)
    assert start.keys() == values.keys()
    moved = {n for n, value in start.items() if not torch.equal(value, values[n].to(value.dtype))}
    assert len(moved) == 28
    assert all(name.split(".")[-2].endswith("_proj") for name in moved)
    for name in moved:
        found = nf4.quantize(values[name])
        columns = values[name].shape[1]
        expected = nf4.weight(*found.parts, columns, getattr(torch, dtype)).float()
        assert torch.equal(start[name].float(), expected)
    updated(trainer)
    expected_rows, after = log_probs(trainer), sent(trainer)
    assert any(not torch.equal(after[name], start[name]) for name in moved)
    trainer.export_hf(str(tmp_path), dtype)
    exported = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in after.items())
    full = make(dtype=dtype)
    with torch.no_grad():
        for name, value in full.backend.module().named_parameters():
            whole(value).copy_(after[name])
    bound = 1e-5 if dtype == "float32" else 0.2  # the tokens are very unlikely ones
    for row, other in zip(expected_rows, log_probs(full), strict=True):
        assert row == pytest.approx(other, abs=bound)


def sent(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every weight by name, as the engine would get it."""
    handle = trainer.export_weights()
    assert handle is not None
    flat = ReceiveBuffer().receive(handle)
    return {entry.name: entry.view(flat).clone() for entry in handle.entries}


def test_a_base_in_4_bits_takes_an_eighth_and_other_layers_stay_as_they_are(make: Make) -> None:
    trainer = make(lora=LoraConfig(r=4, target_modules=("q_proj",), load_in_4bit=True))
    policy = backend(trainer).policy
    kept = [name for name, p in policy.named_parameters() if not p.requires_grad]
    assert {name.split(".")[-2] for name in kept} == {
        "embed_tokens", "norm", "q_norm", "k_norm", "input_layernorm", "post_attention_layernorm",
    }  # fmt: skip
    assert len(dict(quantized(policy))) == 28  # those without an adapter too
    parts = sum(p.numel() * p.element_size() for _, each in quantized(policy) for p in each.parts)
    numbers = sum(each.in_features * each.out_features for _, each in quantized(policy))
    assert parts / (4 * numbers) == pytest.approx(4.127 / 32, rel=0.02)
    resident = {p.data_ptr() for p in backend(trainer).resident()}
    assert all(part.data_ptr() in resident for _, each in quantized(policy) for part in each.parts)


def everything(trainer: Trainer) -> dict[str, bytes]:
    tensors = trainer.backend.state_tensors()
    return {name: local_bytes(tensor).numpy().tobytes() for name, tensor in tensors.items()}


def test_snapshots_and_checkpoints_of_adapters_come_back_bit_by_bit(
    make: Make, tmp_path: Path
) -> None:
    trainer = make(lora=RANK_4, **FAST)
    trainer.snapshot("start")
    start = everything(trainer)
    updated(trainer)
    trainer.save(str(tmp_path))
    saved = everything(trainer)
    metrics = trainer.update(batch(2), "next")
    after = everything(trainer)
    trainer.restore("start")
    assert everything(trainer) == start
    other = make(lora=RANK_4, **FAST)
    assert everything(other) == start  # the same seed, the same A
    other.load(str(tmp_path))
    assert everything(other) == saved
    assert other.update(batch(2), "next") == metrics
    assert everything(other) == after
    names = [name for file in tmp_path.glob("*.safetensors") for name in stored_parameters(file)]
    assert all(".lora_" in name or name == "random/0/host" for name in names)


def test_a_critic_has_adapters_of_its_own(make: Make) -> None:
    trainer = make(lora=RANK_4, **WITH_CRITIC | FAST)
    before = frozen(trainer)
    given = batch()
    metrics = [trainer.update(valued(trainer, given), str(i))[0][0] for i in range(8)]
    names = [n for n in trainer.backend.state_tensors() if n.startswith("critic/")]
    assert all(".lora_" in name or "value_head" in name for name in names)
    assert len([name for name in names if ".lora_B." in name]) == 28
    assert frozen(trainer) == before
    assert metrics[-1]["train/value_loss"] < metrics[0]["train/value_loss"]


def test_modules_that_are_trained_whole_are_sent_and_left_out_of_the_reference(
    make: Make, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model", "Llama")
    kept = LoraConfig(r=4, target_modules=("q_proj",), modules_to_save=("lm_head", "model.norm"))
    trainer = make(model, lora=kept, kl_loss_coef=0.1, **FAST)
    start, sent = log_probs(trainer), weights(trainer).clone()
    assert log_probs(make(model)) == start
    trainer = updated(make(model, lora=kept, kl_loss_coef=0.1, **FAST))
    handle = trainer.export_weights()
    assert handle is not None
    flat = weights(trainer)
    moved = {
        entry.name
        for entry in handle.entries
        if not torch.equal(flat[entry.start // 4 : entry.end // 4],
                           sent[entry.start // 4 : entry.end // 4])
    }  # fmt: skip
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "lm_head", "norm"}
    assert log_probs(trainer, "reference") == start
    full = make(model)
    with torch.no_grad():
        for name, value in full.backend.module().named_parameters():
            entry = next(each for each in handle.entries if each.name == name)
            whole(value).copy_(entry.view(flat.view(torch.uint8)))
    trainer = updated(make(model, lora=kept, kl_loss_coef=0.1, **FAST))
    expected = log_probs(trainer)
    for row, other in zip(expected, log_probs(full), strict=True):
        assert row == pytest.approx(other, abs=1e-5)


def test_peft_loads_modules_that_were_trained_whole(make: Make, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = make_model(tmp_path / "model", "Llama")
    kept = LoraConfig(r=4, target_modules=("q_proj",), modules_to_save=("lm_head", "norm"))
    trainer = updated(make(model, lora=kept, **FAST))
    trainer.export_hf(str(tmp_path), "float32", str(model))
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned, given = PeftModel.from_pretrained(base, tmp_path), batch()
    for tokens, count, expected in zip(
        given.tokens, given.response_lengths, log_probs(trainer), strict=True
    ):
        found = response_log_probs(tuned, tokens, count, trainer.settings.temperature)
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert trainer.export_hf(str(tmp_path), "bfloat16", str(model)) > 0
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 30_000


@pytest.mark.parametrize("kind", ["Qwen3", "Llama"])
def test_an_exported_adapter_is_gone_on_from_to_the_bit(
    make: Make, tmp_path: Path, kind: str
) -> None:
    model, kept = MODEL_DIR, RANK_4
    if kind == "Llama":  # with a module that was trained whole
        model = make_model(tmp_path / "model", kind)
        kept = LoraConfig(
            r=4, use_rslora=True, target_modules=("q_proj",), modules_to_save=("norm",)
        )
    trainer = updated(make(model, lora=kept, **FAST))
    start = log_probs(trainer, "reference")
    trainer.export_hf(str(tmp_path), "float32", str(model))
    expected, sent = log_probs(trainer), weights(trainer).clone()
    other = make(model, lora=kept.model_copy(update={"adapter_path": str(tmp_path)}), **FAST)
    assert log_probs(other) == expected != start
    assert log_probs(other, "reference") == start
    assert torch.equal(weights(other).view(torch.int32), sent.view(torch.int32))
    other.update(batch(3), "on")
    assert log_probs(other) != expected


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"target_modules": ["q_proj", "q_prj"]}, r"(?s)'q_prj', which names nothing.*v_proj"),
        ({"target_modules": ["lm_head"]}, "'lm_head', which names nothing"),
        ({"modules_to_save": ["nrm"]}, r"(?s)'nrm', which names nothing.*q_norm"),
        ({"modules_to_save": ["lm_head"]}, r"(?s)lm_head, which Qwen3ForCausalLM shares"),
    ],
)
def test_a_name_that_cannot_be_trained_is_refused_with_those_that_can(
    make: Make, lora: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        make(lora=LoraConfig(**lora))


def test_the_attention_of_a_mixture_of_experts_takes_adapters(make: Make) -> None:
    attention = LoraConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    trainer = make(MOE_DIR, lora=attention, **FAST)
    start = log_probs(trainer)
    updated(trainer)
    names = {name.split(".")[-4] for name, _ in trainer.backend.named_trained()}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert log_probs(trainer) != start
    assert trainer.export_weights() is not None
