"""An adapter of a directory fits model and settings, or is refused with what differs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.config import ModelConfig
from kit.errors import ConfigError
from kit.models.adapters import AdapterShape
from kit.models.source import find
from kit.tiny import MODEL_DIR

Tensors = dict[str, torch.Tensor]
FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """What PEFT itself saves of the tiny model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def shape(path: Path, **lora: Any) -> AdapterShape:
    settings = {"r": 4, "lora_alpha": 8, "adapter_path": str(path)} | lora
    config = ModelConfig(name="tiny", lora=settings)
    return AdapterShape.of(config, find(config))


def test_an_adapter_that_peft_wrote_is_taken(adapter: Path) -> None:
    assert shape(adapter).modules == 28


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ({"r": 8}, r"has r 4, and model\.lora\.r is 8(?s:.*)set model\.lora\.r: 4"),
        ({"lora_alpha": 16}, r"lora_alpha 8, and model\.lora\.lora_alpha is 16"),
        ({"use_rslora": True}, r"use_rslora False(?s:.*)set model\.lora\.use_rslora: false"),
        (
            {"target_modules": ["q_proj", "v_proj"]},
            r"it also has base_model.*and \d+ more(?s:.*)it adapts \[down_proj, .*v_proj\]",
        ),
        ({"modules_to_save": ["norm"]}, r"it lacks base_model\.model\.model\.norm\.weight"),
        ({"adapter_path": "nowhere"}, r"no directory '/.*nowhere'(?s:.*)hf download"),
        ({"adapter_path": str(MODEL_DIR)}, r"no adapter_config\.json(?s:.*)holds a whole model"),
    ],
)
def test_settings_that_an_adapter_does_not_fit_are_named(
    adapter: Path, lora: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        shape(adapter, **lora)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"use_dora": True}, "use_dora: True, and is computed otherwise"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"bias": "all"}, "bias: 'all'"),
        ({"layers_to_transform": [0, 1]}, r"layers_to_transform: \[0, 1\]"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"use_of_tomorrow": {"x": 1}}, "use_of_tomorrow"),
        ({"init_lora_weights": "pissa_niter_4"}, "belongs to other weights"),
        ({"peft_type": "LOHA"}, "kind 'LOHA'"),
    ],
)
def test_kinds_of_adapters_that_are_not_known_are_refused(
    adapter: Path, settings: dict[str, Any], says: str
) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ConfigError, match=says):
        shape(adapter)


def lacks_one(tensors: Tensors) -> Tensors:
    return {name: value for name, value in tensors.items() if name != FIRST}


def is_wider(tensors: Tensors) -> Tensors:
    return tensors | {FIRST: torch.zeros(4, 7)}


def has_an_embedding(tensors: Tensors) -> Tensors:
    return tensors | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(4, 7)}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lacks_one, r"it lacks .*layers\.0\.self_attn\.q_proj\.lora_A"),
        (is_wider, r"of another model: .*q_proj\.lora_A\.weight has shape \(4, 7\)"),
        (has_an_embedding, "it also has .*lora_embedding_A"),
    ],
)
def test_tensors_that_are_not_those_of_the_settings_are_refused(
    adapter: Path, change: Callable[[Tensors], Tensors], says: str
) -> None:
    file = adapter / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ConfigError, match=says):
        shape(adapter)


def test_files_that_cannot_be_read_are_refused(adapter: Path) -> None:
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:20])
    with pytest.raises(ConfigError, match="no whole safetensors file"):
        shape(adapter)
    file.rename(adapter / "adapter_model.bin")
    with pytest.raises(ConfigError, match="is a pickle"):
        shape(adapter)
    (adapter / "adapter_config.json").write_text("{")
    (adapter / "adapter_model.bin").rename(file)
    with pytest.raises(ConfigError, match=r"adapter_config\.json cannot be read"):
        shape(adapter)


def test_an_adapter_of_another_base_is_warned_of(adapter: Path) -> None:
    file = adapter / "adapter_config.json"
    settings = json.loads(file.read_text()) | {"base_model_name_or_path": "Qwen/Qwen3-0.6B"}
    file.write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"made for Qwen/Qwen3-0\.6B, and model\.name is tiny"):
        shape(adapter)
