"""Heads: computed as the formulas say, whatever samples share, and refused where broken."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kit.errors import ModelError
from kit.models.heads import eagle, eagle3, eagle3_files, files, mtp, mtp_files
from kit.models.heads.head import Head, PolicyStates
from kit.models.packing import pack
from kit.tiny import MODEL_DIR
from tests.heads import MTP, Drafter, Written, WrittenEagle3, random_eagle3, random_head, with_layer
from tests.small_models import make_model

SAMPLES = [
    ([5, 6, 7, 8, 10, 11, 12], 3),
    ([5, 6, 7, 8, 10, 11, 13, 14], 4),
    ([9, 6, 7, 3, 4], 2),
    ([9, 6, 7, 20, 21, 22], 5),  # a prompt of one token
    ([30, 31, 32], 2),
    ([30, 31, 33], 2),
    ([44, 45], 1),  # nothing that a head drafts
]


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_head(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("mimo"), "MiMo")


@pytest.fixture(scope="module", params=["eagle", "eagle3", "eagle3, some words", *MTP])
def written(
    request: pytest.FixtureRequest,
    head: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Drafter, Head]:
    """A head as the formulas have it, and as the trainer computes it."""
    if request.param.startswith("eagle3"):
        words = [*range(3, 40, 2), *range(40, 90)] if "some" in request.param else None
        folder = random_eagle3(tmp_path_factory.mktemp("head"), words=words)
        return WrittenEagle3(folder), eagle3.load(folder, MODEL_DIR)
    if request.param in MTP:
        folder = with_layer(tmp_path_factory.mktemp("model"), request.param)
        return MTP[request.param](folder), mtp.load(folder)
    return Written(head), eagle.load(head)


def log_probs(
    written: tuple[Drafter, Head], samples: list[tuple[list[int], int]], *, share: bool
) -> torch.Tensor:
    known, head = written
    packed = pack([row for row, _ in samples], [n for _, n in samples], share=share)
    hidden, embedded = (torch.zeros(len(packed.tokens_T), x.shape[1]) for x in known.read([3]))
    for rows, (tokens, _) in zip(packed.rows_of, samples, strict=True):
        hidden[list(rows)], embedded[list(rows)] = known.read(tokens)
    states = PolicyStates(hidden, embedded, known.policy.lm_head.weight.detach())
    found: torch.Tensor = head(packed, 0.7, states)[0]
    return found


@pytest.mark.parametrize("share", [True, False])
def test_a_head_computes_what_the_formulas_say(written: tuple[Drafter, Head], share: bool) -> None:
    expected = torch.cat([written[0].log_probs(row, n, 0.7) for row, n in SAMPLES])
    found = log_probs(written, SAMPLES, share=share)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@settings(max_examples=20)
@given(
    st.lists(
        st.lists(st.integers(3, 6), min_size=2, max_size=8).flatmap(
            lambda row: st.tuples(st.just(row), st.integers(1, len(row) - 1))
        ),
        min_size=1,
        max_size=6,
    )
)
def test_what_samples_share_changes_nothing(
    written: tuple[Drafter, Head], samples: list[tuple[list[int], int]]
) -> None:
    apart = log_probs(written, samples, share=False)
    torch.testing.assert_close(log_probs(written, samples, share=True), apart, rtol=0, atol=2e-5)


def test_a_head_that_cannot_draft_says_why(head: Path, tmp_path: Path) -> None:
    assert files.problem_of(head, MODEL_DIR) == ""
    config = json.loads((head / "config.json").read_text())
    weights = load_file(head / "model.safetensors")
    assert {name: tuple(w.shape) for name, w in weights.items()} == files.shapes(config)
    cases = [
        ({"architectures": ["LlamaForCausalLMEagle3"]}, {}, "names LlamaForCausalLMEagle3"),
        ({"num_hidden_layers": 2}, {}, "2 layers"),
        ({"hidden_size": 64}, {}, "hidden states of 64 numbers; the model's 128"),
        ({"tie_word_embeddings": True}, {}, "tie_word_embeddings is true"),
        ({"attention_bias": True}, {}, "has biases"),
        ({"mlp_bias": True}, {}, "has biases"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, r"rotation is scaled \(yarn\)"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, {}, "linear"),
        ({"intermediate_size": 64}, {}, r"mlp.gate_proj.weight is \(448, 128\)"),
        ({}, {"norm.weight": torch.ones(4)}, "have norm.weight"),
        ({}, {"fc.bias": torch.ones(4)}, re.escape("fc.bias is (4,) there, and (128,)")),
    ]
    for changed, more, words in cases:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        save_file(weights | more, tmp_path / "model.safetensors")
        assert re.search(words, files.problem_of(tmp_path, MODEL_DIR))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="size mismatch"):
        eagle.load(tmp_path)


def test_of_a_model_whose_rotation_is_scaled_a_head_is_made_with_a_plain_one(
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "model", "Llama, yarn")
    assert files.problem_of(random_head(tmp_path / "head", model), model) == ""


def test_an_eagle3_head_that_cannot_draft_says_why(tmp_path: Path) -> None:
    head = random_eagle3(tmp_path / "head", words=range(3, 80))
    assert eagle3_files.problem_of(head, MODEL_DIR) == ""
    assert eagle3_files.problem_of(random_eagle3(tmp_path / "whole"), MODEL_DIR) == ""
    config = json.loads((head / "config.json").read_text())
    weights = load_file(head / "model.safetensors")
    reads = "eagle_aux_hidden_state_layer_ids"
    cases = [
        ({"architectures": ["LlamaForCausalLMEagle"]}, {}, "names LlamaForCausalLMEagle"),
        ({"num_hidden_layers": 2}, {}, "2 layers"),
        ({"hidden_size": 64}, {}, "hidden states of 64 numbers; the model's 128"),
        ({"target_hidden_size": 64}, {}, "hidden states of 128"),
        ({"draft_vocab_size": None}, {}, "no output of its own"),
        ({"tie_word_embeddings": True}, {}, "tie_word_embeddings is set"),
        ({"norm_output": True}, {}, "norm_output is set"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None}, {}, "linear"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, {}, "does not read 3 layers"),
        ({"eagle_config": {reads: [0, 1, 3]}}, {}, "layers 0, 1, 3 .* which has 4"),
        ({"eagle_config": {reads: [0, 1]}}, {}, "layers 0, 1 of"),
        ({"eagle_config": None}, {}, "layers 0, 1, 1 of"),  # as SGLang has them of four layers
        ({"draft_vocab_size": 76}, {}, r"lm_head.weight is \(77, 128\)"),
        ({}, {"fc.bias": torch.ones(4)}, "have fc.bias"),
        ({}, {"d2t": None}, "lack d2t"),
        ({}, {"midlayer.hidden_norm.weight": None}, "lack layers.0.hidden_norm.weight"),
    ]
    for changed, more, words in cases:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        kept = {name: w for name, w in (weights | more).items() if w is not None}
        save_file(kept, tmp_path / "model.safetensors")
        assert re.search(words, eagle3_files.problem_of(tmp_path, MODEL_DIR)), words
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Missing key"):
        eagle3.load(tmp_path, MODEL_DIR)


def test_a_models_own_layer_that_cannot_draft_says_why(mimo: Path, tmp_path: Path) -> None:
    assert mtp_files.problem_of(mimo) == ""
    config = json.loads((mimo / "config.json").read_text())
    weights = load_file(mimo / "model.safetensors")
    own = {n: w for n, w in weights.items() if n.startswith("model.mtp_layers.0.")}
    assert {name: tuple(w.shape) for name, w in own.items()} == mtp_files.shapes(config)
    glm = with_layer(tmp_path / "glm", "Glm4Moe")
    assert mtp_files.problem_of(glm) == ""
    groups = json.loads((glm / "config.json").read_text()) | {"n_group": 2}
    (glm / "config.json").write_text(json.dumps(groups))
    assert "in 2 groups" in mtp_files.problem_of(glm)
    assert mtp_files.size_of(mimo) == sum(4 * w.numel() for w in own.values())
    norm, second = "model.mtp_layers.0.final_layernorm.weight", "model.mtp_layers.1.input_proj"
    cases = [
        ({"num_nextn_predict_layers": 0}, {}, "names 0 layers"),
        ({"num_nextn_predict_layers": 2}, {}, "has 2 layers"),
        ({"tie_word_embeddings": True}, {}, "tie_word_embeddings is true"),
        ({"use_sliding_window": True}, {}, "it has windows"),
        ({"rope_parameters": {"rope_type": "yarn"}}, {}, r"rotation is scaled \(yarn\)"),
        ({"intermediate_size": 64}, {}, r"mlp.gate_proj.weight is \(128, 64\)"),
        ({}, {second: torch.ones(4)}, f"have {second}"),
        ({}, {norm: torch.ones(4)}, re.escape(f"{norm} is (4,) there, and (64,)")),
        ({}, {norm: None}, f"lack {norm}"),
    ]
    for changed, more, words in cases:
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        kept = {name: w for name, w in (weights | more).items() if w is not None}
        save_file(kept, tmp_path / "model.safetensors")
        assert re.search(words, mtp_files.problem_of(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="Missing key"):
        mtp.load(tmp_path)
    save_file({n: w for n, w in weights.items() if n not in own}, tmp_path / "model.safetensors")
    assert "0 weights of such layers" in mtp_files.problem_of(tmp_path)


def test_sglang_takes_such_layers_of_these_models_for_a_draft() -> None:
    from sglang.srt.configs import model_config

    source = inspect.getsource(model_config.ModelConfig._config_draft_model)
    named = set(re.findall(r'"(\w+For\w+)"', source))
    made = set(re.findall(r'architectures(?:\[0\])? = \[?"(\w+)"', source))
    assert (named - made) | set(model_config.MIMO_V2_MODEL_ARCHS) == mtp_files.TAKEN
    assert set(mtp_files.ENGINE.values()) <= made
