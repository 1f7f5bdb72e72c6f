"""A model's own layer that predicts a further token, on the real stack: it drafts and learns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kit import RLSession, memory_plan
from kit.errors import ConfigError, ModelError, SessionError
from kit.models.source import find
from kit.rollout.drafts import find_draft
from kit.tiny import MODEL_DIR
from tests.drafting import draft_of, drafting, outlives_its_engine, syncs_reach_their_own, written
from tests.heads import (
    WrittenMtp,
    as_predicted,
    is_odd,
    likeliest,
    taught_own_layer,
    with_own_layer,
)

TEMPERATURES = (1.0, 0.2)


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_own_layer(tmp_path_factory.mktemp("mimo"))


@pytest.fixture(scope="module")
def running(mimo: Path, alone: None) -> Iterator[RLSession]:
    """A session that trains the layer with which its engines write."""
    with RLSession.start(with_own_layer(mimo, train=True), reward=is_odd) as session:
        session.snapshot("first")
        yield session


@pytest.fixture
def session(running: RLSession) -> RLSession:
    """It in its first moment."""
    running.restore("first")
    running.sync()
    return running


def test_a_models_own_layer_changes_no_token(running: RLSession, mimo: Path) -> None:
    """The likeliest ones are Transformers'; tests/test_mtp_sessions.py has those that are drawn."""
    for sample in written(running, 1e-5):
        prompt = sample.tokens[: -sample.response_length]
        assert sample.tokens == likeliest(mimo, prompt, sample.response_length)[0]


def test_the_engine_drafts_what_the_trainers_layer_computes(
    session: RLSession, mimo: Path, tmp_path: Path
) -> None:
    """Before training, and after it, when layer, embeddings and output have all moved."""
    before = WrittenMtp(mimo)
    for temperature in TEMPERATURES:
        assert as_predicted(written(session, temperature), before, 3) > 20
    session.train(3, show=False)
    exported = session.export_hf(tmp_path / "policy", dtype="float32")
    after = WrittenMtp(exported)
    assert after.weights.keys() == before.weights.keys()
    for name in ("model.mtp_layers.0.input_proj.weight", "lm_head.weight"):
        assert not torch.equal(after.weights[name], before.weights[name])
    for temperature in TEMPERATURES:
        assert as_predicted(written(session, temperature), after, 3) > 20
    assert find_draft(with_own_layer(exported), find(with_own_layer(exported).model))
    with pytest.raises(SessionError, match="is a layer of the model"):
        session.export_hf(tmp_path / "draft", draft=True)


def test_each_sync_reaches_what_it_is_for(session: RLSession) -> None:
    names = draft_of(session)[0]
    assert len(names) == 11  # q, k and v are one piece, and so are gate and up
    assert all(name.startswith("model.mtp_layers.0.") for name in names)
    syncs_reach_their_own(session)


def test_an_engine_that_died_gets_the_layer_that_was_learned(session: RLSession) -> None:
    outlives_its_engine(session)


def test_a_session_shows_what_drafts(session: RLSession) -> None:
    shown = session._repr_mimebundle_()["text/plain"]
    assert "its own MTP layer, learns along: a chain of 3 tokens" in shown


# ---- settings ----------------------------------------------------------------------------------


def test_what_cannot_draft_with_a_layer_of_its_own_is_refused(mimo: Path) -> None:
    config = with_own_layer(mimo)
    model = find(config.model)
    assert find_draft(config, model)
    with pytest.raises(ConfigError, match="mtp was not tried with Qwen3ForCausalLM"):
        find_draft(with_own_layer(MODEL_DIR), find(with_own_layer(MODEL_DIR).model))
    assert find_draft(with_own_layer(mimo, train=True, eagle_topk=2), model)
    with pytest.raises(ConfigError, match="mtp drafts with a layer of the model itself"):
        with_own_layer(mimo, draft_model="x")
    with pytest.raises(ConfigError, match="only chains of standalone"):
        with_own_layer(mimo, when="auto")
    with pytest.raises(ConfigError, match="on a model with adapters"):
        config.replace("model.lora", {"r": 4})
    with pytest.raises(ConfigError, match=r"mtp_loss_scaling_factor is set, and .* is eagle"):
        drafting("x", algorithm="eagle").replace("training.draft", {"mtp_loss_scaling_factor": 0.1})


@pytest.mark.parametrize("architecture", ["MiMoForCausalLM", "Qwen3MoeForCausalLM"])
def test_a_draft_of_which_sglang_would_take_one_layer_is_refused(
    architecture: str, mimo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = with_own_layer(mimo).replace(
        "engine.speculative", {"algorithm": "standalone", "draft_model": str(mimo)}
    )
    found = replace(find(config.model), architecture=architecture)
    monkeypatch.setattr("kit.rollout.drafts.find", lambda _: found)
    with pytest.raises(ModelError, match=f"is a {architecture}, which cannot be a draft"):
        find_draft(config, found)


def test_the_memory_plan_counts_the_layer_apart_from_the_model(mimo: Path) -> None:
    weights = load_file(mimo / "model.safetensors")
    own = sum(value.numel() for name, value in weights.items() if "mtp_layers" in name)
    others = sum(value.numel() for value in weights.values()) - own
    config = with_own_layer(mimo, train=True).replace("engine.replicas", 1)
    sizes = dict(memory_plan(config).phase("generate").parts)
    assert sizes["engine: draft"] == 4 * own  # without embeddings, float32
    assert sizes["engine: weights"] == 4 * others
    assert sizes["trainer: draft, optimizer"] == 12 * own
