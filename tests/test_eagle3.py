"""EAGLE-3 heads on the real stack: the engine drafts what the trainer's head computes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kit import RLSession, make_draft, memory_plan
from kit.errors import ConfigError, ModelError
from kit.models.source import ModelShape, find
from kit.rollout.drafts import find_draft
from kit.samples import Rollout
from kit.tiny import MODEL_DIR
from tests.conftest import Shared
from tests.drafting import TINY, draft_of, drafting, plainly, same, syncs_reach_their_own, written
from tests.heads import WrittenEagle3, as_predicted, headed, random_head, taught_eagle3


@pytest.fixture(scope="module")
def plain(shared: Shared) -> dict[float, Rollout]:
    return plainly(shared)


@pytest.fixture(scope="module")
def head(plain: dict[float, Rollout], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that lacks words for some tokens that are written."""
    texts = [(sample.tokens, sample.response_length) for sample in plain[1.0]]
    used = sorted({token for tokens, _ in texts for token in tokens})
    words = used[::4] + used[1::4] + used[2::4]
    folder = tmp_path_factory.mktemp("head")
    return taught_eagle3(folder, MODEL_DIR, texts[::4], sorted(words))


@pytest.fixture(scope="module")
def running(head: Path) -> Iterator[RLSession]:
    """A session that trains the head with which its engines write."""
    config = headed(head, train=True, algorithm="eagle3")
    with RLSession.start(config) as session:
        session.snapshot("first")
        yield session


@pytest.fixture
def session(running: RLSession) -> RLSession:
    """It in its first moment."""
    running.restore("first")
    running.sync()
    return running


def test_eagle3_heads_change_no_token(running: RLSession, plain: dict[float, Rollout]) -> None:
    for temperature, expected in plain.items():
        same(written(running, temperature), expected)


def test_the_engine_drafts_what_the_trainers_eagle3_head_computes(
    session: RLSession, head: Path, tmp_path: Path
) -> None:
    """Before training, and after it, when head, embeddings and layers have all moved."""
    before = WrittenEagle3(head)
    for temperature in (0.7, 5.0):  # the latter's responses are long
        assert as_predicted(written(session, temperature), before, 3) > 20
    session.train(3, show=False)
    policy = session.export_hf(tmp_path / "policy", dtype="float32")
    trained = session.export_hf(tmp_path / "head", dtype="float32", draft=True)
    after = WrittenEagle3(trained, policy)
    assert torch.equal(after.words, before.words)
    for name in ("fc.weight", "lm_head.weight"):
        assert not torch.equal(after.weights[name], before.weights[name])
    for temperature in (0.7, 5.0):
        assert as_predicted(written(session, temperature), after, 3) > 20
    assert find_draft(headed(trained, algorithm="eagle3"), find(TINY.model))


def test_each_sync_reaches_what_it_is_for(session: RLSession) -> None:
    assert set(draft_of(session)[0]) > {"fc.weight", "norm.weight", "lm_head.weight"}
    syncs_reach_their_own(session)
    assert "an EAGLE-3 head, learns along" in session._repr_mimebundle_()["text/plain"]


# ---- settings ----------------------------------------------------------------------------------


def test_what_is_no_eagle3_head_for_the_model_is_refused(head: Path, tmp_path: Path) -> None:
    model = find(TINY.model)
    assert find_draft(headed(head, algorithm="eagle3"), model)
    older = random_head(tmp_path / "older")
    with pytest.raises(ModelError, match=r"no EAGLE-3 head .* names LlamaForCausalLMEagle,"):
        find_draft(headed(older, algorithm="eagle3"), model)
    with pytest.raises(ModelError, match=r"no EAGLE head .* names LlamaForCausalLMEagle3,"):
        find_draft(headed(head), model)
    with pytest.raises(ModelError, match=r"an EAGLE-3 head, .* is standalone.\n.*eagle3"):
        find_draft(drafting(head), model)
    other = replace(model, architecture="GemmaForCausalLM")
    with pytest.raises(ConfigError, match="eagle3 was not tried with GemmaForCausalLM"):
        find_draft(headed(head, algorithm="eagle3"), other)
    assert find_draft(headed(head, train=True, algorithm="eagle3", eagle_topk=2), model)
    with pytest.raises(ConfigError, match="--algorithm eagle3"):
        headed(head).replace("engine.speculative", {"algorithm": "eagle3"})


def test_a_head_that_cannot_be_made_is_refused_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="eagle3 was not tried with Qwen3MoeForCausalLM"):
        make_draft("tiny-moe", tmp_path / "head", algorithm="eagle3")


def test_the_memory_plan_counts_an_eagle3_head(head: Path) -> None:
    config = headed(head, train=True, algorithm="eagle3").replace("engine.replicas", 1)
    sizes = dict(memory_plan(config).phase("generate").parts)
    assert sizes["engine: draft"] == 4 * ModelShape.read(head).parameters
