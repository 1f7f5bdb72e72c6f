"""Dropout of every kind that Transformers' models have is off, in training mode too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kit.models.dropout import configured, switch_off

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
KINDS = [
    ("Qwen2", {"attention_dropout": 0.3}),
    ("Granite", {"attention_dropout": 0.3}),
    ("Starcoder2", {"attention_dropout": 0.3, "residual_dropout": 0.3, "embedding_dropout": 0.3}),
    ("Phi", {"attention_dropout": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3}),
    ("Persimmon", {"attention_dropout": 0.3, "hidden_dropout": 0.3}),
    ("Mixtral", {"attention_dropout": 0.3, "router_jitter_noise": 0.3}),
]


@pytest.mark.parametrize(("kind", "settings"), KINDS)
def test_a_pass_in_training_mode_is_that_in_evaluation_mode(
    kind: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    config.save_pretrained(tmp_path)
    assert {words.split()[0] for words in configured(tmp_path)} == settings.keys()
    tokens = torch.arange(12)[None]
    still = model.eval()(tokens).logits
    assert not torch.equal(model.train()(tokens).logits, still)
    switch_off(model)
    assert torch.equal(model.train()(tokens).logits, still)


def test_a_classifiers_dropout_and_zeros_are_none(tmp_path: Path) -> None:
    text = '{"classifier_dropout": 0.1, "attention_dropout": 0.0, "text_config": {"dropout": 0.2}}'
    (tmp_path / "config.json").write_text(text)
    assert configured(tmp_path) == ["text_config.dropout 0.2"]
