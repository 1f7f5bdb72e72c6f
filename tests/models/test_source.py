"""Where a model is, and what is said where it is not."""

import json
import shutil
from pathlib import Path

import pytest

from kit.config import ModelConfig
from kit.errors import ConfigError, ModelError
from kit.models.policy import load
from kit.models.source import find
from kit.tiny import MODEL_DIR


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The tiny model in a directory of its own."""
    return Path(shutil.copytree(MODEL_DIR, tmp_path / "model"))


def refusal(name: str | Path) -> str:
    with pytest.raises(ModelError) as caught:
        find(ModelConfig(name=str(name)))
    return str(caught.value)


def test_the_embedded_model_is_found_by_the_name_tiny() -> None:
    source = find(ModelConfig(name="tiny"))
    assert Path(source.path) == MODEL_DIR
    assert source.architecture == "Qwen3ForCausalLM"
    assert source.context_length == 512


def test_a_directory_is_found_by_its_path_and_a_shorter_context_is_kept(copy: Path) -> None:
    source = find(ModelConfig(name=str(copy), context_length=100))
    assert Path(source.path) == copy.resolve()
    assert source.context_length == 100


def test_a_context_longer_than_the_model_holds_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError, match=r"context_length is 513, but tiny holds 512.*\n.*512 or"):
        find(ModelConfig(name="tiny", context_length=513))


def test_a_missing_directory_is_named_with_the_ways_to_give_a_model(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "check model.name" in message


def test_a_misspelt_tiny_is_suggested_and_another_word_is_not() -> None:
    assert "Did you mean 'tiny'?" in refusal("tinny")
    assert "Did you mean" not in refusal("whatever")
    assert "Qwen/Qwen3-0.6B" in refusal("whatever")


def test_a_hub_model_that_cannot_be_had_names_the_ways_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    message = refusal("nobody/no-such-model")
    assert "'nobody/no-such-model' is no directory here" in message
    assert "not in the local cache" in message
    assert "set model.name to its path" in message


def test_a_directory_without_config_json_is_no_model(tmp_path: Path) -> None:
    message = refusal(tmp_path)
    assert "has no config.json" in message
    assert "point model.name at" in message


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"max_position_embeddings": 8}', "\xff"])
def test_a_config_json_that_describes_no_language_model_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    assert f"{tmp_path / 'config.json'} does not describe a language model" in refusal(tmp_path)


def load_refusal(path: Path) -> str:
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        load(str(path))
    message = str(caught.value)
    assert str(path) in message
    assert "What to do:" in message
    return message


def test_weights_that_are_missing_or_broken_are_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    load_refusal(copy)
    weights.unlink()
    load_refusal(copy)


def test_weights_of_another_shape_are_refused(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"intermediate_size": 64}))
    load_refusal(copy)


def test_weights_that_lack_a_layer_are_refused_instead_of_made_up(copy: Path) -> None:
    settings = json.loads((copy / "config.json").read_text())
    more = {"num_hidden_layers": 5, "layer_types": ["full_attention"] * 5}
    (copy / "config.json").write_text(json.dumps(settings | more))
    assert "layers.4" in load_refusal(copy)


def test_an_unknown_kind_of_model_is_refused(copy: Path) -> None:
    (copy / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    assert "abacus" in load_refusal(copy)


def test_a_model_without_the_parts_that_training_needs_is_refused_by_the_part(
    tmp_path: Path,
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    small = GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16, n_positions=16)
    GPT2LMHeadModel(small).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="no part named 'model'") as caught:
        load(str(tmp_path))
    assert "Llama, Qwen or Mistral" in str(caught.value)
