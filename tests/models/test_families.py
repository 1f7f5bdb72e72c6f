"""The trainer computes what Transformers computes, whatever the family, or refuses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kit.errors import ModelError
from kit.models import own
from kit.models.packing import pack
from kit.models.policy import Policy, load
from kit.models.state_dict import as_saved, named_weights, saved_buffers
from tests.small_models import FAMILIES, make_model

REFUSED = {
    "Phi": "bias in its output layer",
}
"""What the trainer does not compute, with the word that its error has for it."""
BEFORE_CALL = {"StableLm": "kit_packed"}
"""Refused by the comparison at a session's start: they do not hand the layout to attention."""


def sequences() -> tuple[list[list[int]], list[int]]:
    """Two that begin alike and one of its own, all longer than the windows; response lengths."""
    draw = torch.Generator().manual_seed(1)
    one, other = (torch.randint(3, 104, (n,), generator=draw).tolist() for n in (30, 20))
    return [one, other, [*one[:18], *other[:9]]], [29, 19, 9]


def plain(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    own.register(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def by_transformers(model: Any) -> torch.Tensor:
    rows = []
    for row, count in zip(*sequences(), strict=True):
        logp = model(torch.tensor([row])).logits[0].log_softmax(-1)[len(row) - count - 1 : -1]
        rows.append(logp[torch.arange(count), row[-count:]])
    return torch.cat(rows)


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(REFUSED) - set(BEFORE_CALL)))
def test_log_probs_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family)
    expected = by_transformers(plain(folder))
    policy = load(str(folder)).eval()
    for share in (False, True):
        found, _ = policy(pack(*sequences(), share=share), 1.0)
        assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "further"),
    [
        ("Gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": 0.5}),
        ("NanoChat", {}),
        ("Granite", {}),
    ],
)
def test_logits_are_those_of_transformers(
    tmp_path: Path, family: str, further: dict[str, Any]
) -> None:
    folder = make_model(tmp_path / "model", family, **further)
    model, policy = plain(folder), load(str(folder)).eval()
    tokens = torch.tensor([[5, 9, 40, 77]])
    hidden = model.model(tokens).last_hidden_state[0]
    expected = model(tokens).logits[0]
    assert_close(policy.logits_of(hidden, policy.model.lm_head.weight), expected)
    row = tokens[0].tolist()
    logp = (expected / 0.7).log_softmax(-1)[range(3), row[1:]]
    assert_close(policy(pack([row], [3]), 0.7)[0], logp, rtol=0, atol=1e-5)


def test_a_soft_cap_of_logits_that_also_have_a_factor_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "Granite", final_logit_softcapping=5.0)
    with pytest.raises(ModelError, match=r"soft cap of 5 and a factor of 0\.25"):
        load(str(folder))


LEARNERS = [
    "Mistral, window",
    "Granite",
    "Gemma3",
    "NanoChat",
    "Gemma2",
    "GptOss",
    "DeepseekV3",
    "Qwen3Next",
]


@pytest.mark.parametrize("family", LEARNERS)
def test_gradients_are_those_of_transformers(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family)
    model, policy = plain(folder), load(str(folder)).eval()
    by_transformers(model).sum().backward()
    policy(pack(*sequences()), 1.0)[0].sum().backward()
    expected = dict(model.named_parameters())
    for name, value in policy.model.named_parameters():
        assert_close(value.grad, expected[name].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_what_is_not_computed_is_refused_by_its_name(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family)
    with pytest.raises(ModelError, match=REFUSED[family]):
        Policy.forward(load(str(folder)).eval(), pack(*sequences()), 1.0)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Glm4Moe", "Apertus", "Llama"])
def test_weights_go_back_to_the_names_and_values_of_the_files(tmp_path: Path, family: str) -> None:
    from safetensors.torch import load_file

    folder = make_model(tmp_path / "model", family)
    model = load(str(folder)).model
    files = load_file(folder / "model.safetensors")
    found = {
        saved: part
        for name, value in named_weights(model)
        for saved, part in as_saved(model, name, value)
    }
    assert set(found) == set(files)
    for name, value in files.items():
        assert torch.equal(found[name], value), name
    kept = {name.rpartition(".")[2] for name, _ in saved_buffers(model)}
    assert ("e_score_correction_bias" in kept) == (family == "Glm4Moe")
