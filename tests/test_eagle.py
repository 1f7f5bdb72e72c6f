"""EAGLE heads on the real stack: the engine drafts what the trainer's head computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kit import RLSession, make_draft, memory_plan
from kit.errors import ConfigError, ModelError
from kit.models.source import find
from kit.rollout.drafts import find_draft
from kit.samples import Rollout
from kit.tiny import MODEL_DIR
from tests.conftest import Shared
from tests.drafting import (
    TINY,
    draft_of,
    drafting,
    outlives_its_engine,
    plainly,
    same,
    syncs_reach_their_own,
    written,
)
from tests.heads import Written, as_predicted, headed, taught_by


@pytest.fixture(scope="module")
def plain(shared: Shared) -> dict[float, Rollout]:
    return plainly(shared)


@pytest.fixture(scope="module")
def head(plain: dict[float, Rollout], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_by(plain[1.0], tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def running(head: Path) -> Iterator[RLSession]:
    """A session that trains the head with which its engines write."""
    with RLSession.start(headed(head, train=True)) as session:
        session.snapshot("first")
        yield session


@pytest.fixture
def session(running: RLSession) -> RLSession:
    """It in its first moment."""
    running.restore("first")
    running.sync()
    return running


def test_heads_change_no_token(running: RLSession, plain: dict[float, Rollout]) -> None:
    for temperature, expected in plain.items():
        rollout = written(running, temperature)
        same(rollout, expected)
        assert sum(s.spec_info.get("num_correct_drafts", 0) for s in rollout) > 0


def test_the_engine_drafts_what_the_trainers_head_computes(
    session: RLSession, head: Path, tmp_path: Path
) -> None:
    """Before training, and after it, when head, embeddings and output have all moved."""
    before = Written(head)
    for temperature in (0.7, 5.0):  # the latter's responses are long
        assert as_predicted(written(session, temperature), before, 3) > 20
    session.train(3, show=False)
    policy = session.export_hf(tmp_path / "policy", dtype="float32")
    trained = session.export_hf(tmp_path / "head", dtype="float32", draft=True)
    after = Written(trained, policy)
    assert not torch.equal(after.weights["fc.weight"], before.weights["fc.weight"])
    assert not torch.equal(after.policy.lm_head.weight, before.policy.lm_head.weight)
    for temperature in (0.7, 5.0):
        assert as_predicted(written(session, temperature), after, 3) > 20
    assert find_draft(headed(trained), find(TINY.model))


def test_each_sync_reaches_what_it_is_for(session: RLSession) -> None:
    own = {"fc.weight", "fc.bias", "layers.0.self_attn.qkv_proj.weight"}
    assert set(draft_of(session)[0]) > own
    syncs_reach_their_own(session)


def test_an_engine_that_died_gets_the_head_that_was_learned(session: RLSession) -> None:
    outlives_its_engine(session)


def test_a_session_shows_what_drafts(session: RLSession) -> None:
    shown = session._repr_mimebundle_()["text/plain"]
    assert "an EAGLE head, learns along: a chain of 3 tokens" in shown


# ---- settings ----------------------------------------------------------------------------------


def test_what_is_no_head_for_the_model_is_refused(tmp_path: Path, head: Path) -> None:
    model = find(TINY.model)
    assert find_draft(headed(head), model)
    with pytest.raises(ModelError, match=r"no EAGLE head .* names Qwen3ForCausalLM"):
        find_draft(headed(MODEL_DIR), model)
    with pytest.raises(ModelError, match=r"is an EAGLE head, and .* is standalone"):
        find_draft(drafting(head), model)
    with pytest.raises(ConfigError, match="eagle was not tried with GemmaForCausalLM"):
        find_draft(headed(head), replace(model, architecture="GemmaForCausalLM"))
    assert find_draft(headed(head, train=True, eagle_topk=2), model)
    with pytest.raises(ConfigError, match="eagle, and no draft_model is named"):
        headed(head).replace("engine.speculative", {"algorithm": "eagle"})
    with pytest.raises(ConfigError, match="only chains of standalone"):
        headed(head, when="auto")
    with pytest.raises(ConfigError, match="on a model with adapters"):
        headed(head).replace("model.lora", {"r": 4})


def test_a_head_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="2 layers is asked for"):
        make_draft("tiny", tmp_path / "head", algorithm="eagle", layers=2)
    with pytest.raises(ConfigError, match="no draft of the kind 'eagel'"):
        make_draft("tiny", tmp_path / "head", algorithm="eagel")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="eagle was not tried with Qwen3MoeForCausalLM"):
        make_draft("tiny-moe", tmp_path / "head", algorithm="eagle")


def test_the_memory_plan_counts_a_head(head: Path) -> None:
    own = sum(value.numel() for value in load_file(head / "model.safetensors").values())
    config = headed(head, train=True).replace("engine.replicas", 1)
    sizes = dict(memory_plan(config).phase("generate").parts)
    assert sizes["engine: draft"] == 4 * own  # without embeddings, float32
    assert sizes["trainer: draft, optimizer"] == 12 * own
