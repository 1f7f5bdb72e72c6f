"""A model under its hub name: from the cache of the Hugging Face hub to weights in the trainer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Qwen3ForCausalLM

from tests.hub import drop, put
from tests.small_models import random_model, with_tiny_tokenizer

NAME = "somebody/Qwen3-Small"
LOAD = """
import json, sys, torch
from safetensors.torch import load_file
from kit.config import ModelConfig
from kit.models.policy import load
from kit.models.source import find

source = find(ModelConfig(name=sys.argv[1]))
model = load(source.path).model
expected = load_file(sys.argv[2])
weights = model.state_dict()
print(json.dumps({
    "path": source.path,
    "context": source.context_length,
    "architecture": source.architecture,
    "bytes": source.bytes,
    "equal": all(torch.equal(weights[name], value.float()) for name, value in expected.items()),
    "names": sorted(expected) == sorted(set(weights) - {"lm_head.weight"}),
    "dtypes": sorted({str(value.dtype) for value in weights.values()}),
    "tied": model.lm_head.weight is model.model.embed_tokens.weight,
}))
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 of two layers as the hub has them: bfloat16, tied, in several files."""
    folder = tmp_path_factory.mktemp("small")
    settings = {
        "vocab_size": 512, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
        "max_position_embeddings": 256, "tie_word_embeddings": True,
    }  # fmt: skip
    random_model(folder, "Qwen3", settings, dtype=torch.bfloat16, shard="20KB")
    return with_tiny_tokenizer(folder)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def python(home: Path, *words: object) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-W", "ignore", "-c", *map(str, words)]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_a_sharded_tied_bfloat16_model_is_found_and_loaded_by_its_hub_name(
    small: Path, home: Path, tmp_path: Path
) -> None:
    snapshot = put(home, NAME, small)
    assert len(list(snapshot.glob("model-*.safetensors"))) > 2
    written = Qwen3ForCausalLM.from_pretrained(small, dtype=torch.bfloat16).state_dict()
    written.pop("lm_head.weight")
    save_file(written, tmp_path / "expected.safetensors")
    done = python(home, LOAD, NAME, tmp_path / "expected.safetensors")
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "path": str(snapshot),
        "context": 256,
        "architecture": "Qwen3ForCausalLM",
        "bytes": sum(file.stat().st_size for file in small.glob("*.safetensors")),
        "equal": True,
        "names": True,
        "dtypes": ["torch.float32"],
        "tied": True,
    }


FIND = "import sys; from kit.config import ModelConfig; from kit.models.source import find\n"
FIND += "from kit.errors import ModelError\ntry: find(ModelConfig(name=sys.argv[1]))\n"
FIND += "except ModelError as error: print(error)"


def test_a_shard_that_is_missing_is_told_before_anything_starts(small: Path, home: Path) -> None:
    snapshot = put(home, NAME, small)
    shard = sorted(snapshot.glob("model-*.safetensors"))[1].name
    drop(snapshot, shard)
    message = python(home, FIND, NAME).stdout
    assert f"{shard} is a link to a file that is gone" in message
    assert "kit doctor" in message


def test_a_model_that_is_not_in_the_cache_is_refused_without_a_network(home: Path) -> None:
    message = python(home, FIND, NAME).stdout
    assert f"The model {NAME!r} is no directory here, is not in the local cache" in message
    assert "What to do:" in message
