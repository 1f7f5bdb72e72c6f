"""Transformers' models on the shared operators: the same model, and its rows by themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from kit.errors import ConfigError, ModelError
from kit.models import policy
from kit.models.families.exact import refuse_others
from kit.models.packing import pack
from kit.operators.ladder import Recorder, first_difference
from tests.small_models import make_model, mixture_of_experts

TOKENS = [[5, 9, 7, 20, 31, 44], [5, 9, 7, 20, 8], [5, 9, 7, 3, 3, 3, 3, 3, 3], [60, 61, 62]]
LENGTHS = [3, 2, 6, 1]


def scores(model: Any, tokens: list[list[int]], lengths: list[int], *, share: bool) -> Any:
    with torch.no_grad():
        return model(pack(tokens, lengths, share=share), 0.8)[0].split(lengths)


@pytest.fixture(params=["Llama", "Qwen2", "Qwen3", "Qwen3Moe"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(make_model(tmp_path / "model", request.param))


def test_a_model_computes_what_it_did_to_rounding(path: str) -> None:
    plain, shared = policy.load(path), policy.load(path)
    shared.share_operators(torch.device("cpu"))
    packed = pack(TOKENS, LENGTHS)
    for ours, theirs in zip(shared(packed, 0.8), plain(packed, 0.8), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)
    weights = torch.linspace(-1, 1, sum(LENGTHS))
    for model in (plain, shared):
        logp, entropy = model(packed, 0.8)
        ((logp + 0.1 * entropy) * weights).sum().backward()
    pairs = zip(plain.named_parameters(), shared.parameters(), strict=True)
    for (name, parameter), other in pairs:
        torch.testing.assert_close(
            other.grad, parameter.grad, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_a_sample_has_the_same_bits_alone_packed_and_with_its_beginning_shared(path: str) -> None:
    model = policy.load(path)
    model.share_operators(torch.device("cpu"))
    alone = [scores(model, [t], [n], share=False)[0] for t, n in zip(TOKENS, LENGTHS, strict=True)]
    for share in (False, True):
        for chosen in ([0, 1, 2, 3], [3, 2], [1, 0, 1]):
            tokens, lengths = [TOKENS[i] for i in chosen], [LENGTHS[i] for i in chosen]
            for place, part in zip(
                chosen, scores(model, tokens, lengths, share=share), strict=True
            ):
                assert torch.equal(part, alone[place])


@pytest.mark.parametrize("name", ["Gemma", "Phi3", "Granite"])
def test_a_family_without_shared_operators_is_refused_by_name(name: str, tmp_path: Path) -> None:
    model = policy.load(str(make_model(tmp_path / "model", name)))
    with pytest.raises(ModelError, match=f"does not know {name}ForCausalLM"):
        model.share_operators(torch.device("cpu"))


def test_a_part_that_is_not_known_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, use_sliding_window=True, sliding_window=8,
        max_window_layers=1,
    )  # fmt: skip
    windowed = policy.Policy(AutoModelForCausalLM.from_config(config))
    with pytest.raises(ModelError, match="see a window only"):
        windowed.share_operators(torch.device("cpu"))
    config = Qwen2Config(**config.to_dict() | {"use_sliding_window": False, "hidden_act": "gelu"})
    config.layer_types = ["full_attention"] * 2
    with pytest.raises(ModelError, match="its activation is 'gelu'"):
        policy.Policy(AutoModelForCausalLM.from_config(config)).share_operators(torch.device("cpu"))


def test_what_cannot_be_had_is_refused_before_anything_starts() -> None:
    refuse_others("Qwen3ForCausalLM", "cpu")
    with pytest.raises(ModelError, match="MixtralForCausalLM"):
        refuse_others("MixtralForCausalLM", "cpu")
    refuse_others("Qwen3ForCausalLM", "cuda", "bfloat16")
    with pytest.raises(ConfigError, match="no operators for float32 on a GPU"):
        refuse_others("Qwen3ForCausalLM", "cuda", "float32")
    refuse_others("Qwen3ForCausalLM", "cuda", "bfloat16", "triton")
    with pytest.raises(ConfigError, match="own attention on a CPU, and not 'triton'"):
        refuse_others("Qwen3ForCausalLM", "cpu", "float32", "triton")
    refuse_others("Qwen3MoeForCausalLM", "cuda")
    with pytest.raises(ConfigError, match="no operators for mps"):
        refuse_others("Qwen3ForCausalLM", "mps")


def test_a_gpu_refuses_experts_whose_sizes_its_library_cannot_multiply(tmp_path: Path) -> None:
    odd = policy.load(str(mixture_of_experts(tmp_path / "model", moe_intermediate_size=12)))
    with pytest.raises(ModelError, match="no multiples of 8"):
        odd.share_operators(torch.device("cuda"))


def test_the_first_part_that_differs_is_named(path: str) -> None:
    """The parts after it differ as well; those before do not."""
    one, other = policy.load(path), policy.load(path)
    for model in (one, other):
        model.share_operators(torch.device("cpu"))
    with torch.no_grad():
        other.model.model.layers[1].self_attn.o_proj.weight[3, 5] += 1e-3
    recorders = [Recorder(model.model) for model in (one, other)]
    for model in (one, other):
        scores(model, TOKENS[:1], LENGTHS[:1], share=False)
    first, second = (recorder.digests() for recorder in recorders)
    name, agree = first_difference(first, second)
    assert name == "model.layers.1.self_attn.o_proj"
    assert agree == list(first).index(name) > 7
    assert first_difference(first, first) == ("", len(first))
    scores(one, TOKENS[:1], LENGTHS[:1], share=False)  # nothing is recorded any more
    assert recorders[0].digests() == first
