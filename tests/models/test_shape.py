"""The sizes of a model, read without loading it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from kit.errors import ModelError
from kit.memory import ModelShape
from kit.models.policy import load
from kit.tiny import MODEL_DIR

SMALL = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}


def made(folder: Path, config: Qwen3Config | Qwen3MoeConfig, shard: str = "5GB") -> Path:
    """A model of random weights in a directory."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size=shard)
    return folder


def counted(folder: Path) -> int:
    return sum(p.numel() for p in load(str(folder)).parameters())


def test_the_tiny_model_has_as_many_parameters_as_loading_it_counts() -> None:
    shape = ModelShape.read(MODEL_DIR)
    assert shape.parameters == counted(MODEL_DIR)
    assert shape.tied


def test_sizes_are_those_of_the_configuration(tmp_path: Path) -> None:
    shape = ModelShape.read(made(tmp_path, Qwen3Config(**SMALL, tie_word_embeddings=True)))
    assert shape == ModelShape(counted(tmp_path), 3, 64, 96, 4, 2, 24, 512, tied=True)
    assert shape.key_value_bytes(2) == 2 * 3 * 2 * 24 * 2


def test_an_untied_output_embedding_counts_and_shards_are_counted_together(tmp_path: Path) -> None:
    config = Qwen3Config(**SMALL, tie_word_embeddings=False)
    shape = ModelShape.read(made(tmp_path, config, shard="100KB"))
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert shape.parameters == counted(tmp_path)
    assert not shape.tied


def test_all_experts_count_and_a_token_sees_some_of_them(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(**SMALL, **EXPERTS, tie_word_embeddings=False)
    shape = ModelShape.read(made(tmp_path, config))
    assert shape.parameters == counted(tmp_path)
    assert shape.intermediate == 2 * 40


def test_a_tied_embedding_that_the_file_holds_twice_counts_once(tmp_path: Path) -> None:
    folder = made(tmp_path, Qwen3Config(**SMALL, tie_word_embeddings=True))
    before = ModelShape.read(folder).parameters
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    assert ModelShape.read(folder).parameters == before == counted(folder)


def test_a_second_copy_under_another_name_does_not_count(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    assert ModelShape.read(folder) == ModelShape.read(MODEL_DIR)


def test_a_directory_that_does_not_tell_its_sizes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        ModelShape.read(tmp_path)
    config = json.loads((MODEL_DIR / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"no \*\.safetensors"):
        ModelShape.read(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ModelError, match="cannot be read"):
        ModelShape.read(tmp_path)
    del config["num_attention_heads"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="num_attention_heads"):
        ModelShape.read(tmp_path)
