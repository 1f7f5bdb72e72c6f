"""Heads on a GPU, in sessions: the engine drafts what their formulas say, and they learn along."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kit import RLSession, SessionConfig
from kit.samples import Rollout
from kit.tiny import MODEL_DIR
from tests.drafting import PROMPTS, outlives_its_engine, syncs_reach_their_own, written
from tests.heads import (
    MTP,
    Drafter,
    Texts,
    Written,
    WrittenEagle3,
    headed,
    is_odd,
    likeliest,
    taught,
    taught_eagle3,
    taught_own_layer,
    with_own_layer,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="for a GPU"),
]
STEPS = 3
AGREE = 0.95
"""Share of the passes: trainer's formulas are in float32 here, and the engine's in bfloat16."""
GIB = 8.0
"""Of the card, for each session."""
KINDS = {"eagle": Written, "eagle3": WrittenEagle3, **MTP}


def texts() -> Texts:
    """Some of what the tiny model likes best."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL_DIR)
    return [likeliest(MODEL_DIR, tokenizer.encode(prompt), 12) for prompt in PROMPTS[::4]]


@dataclass(slots=True)
class Running:
    """A session, and the head that was there before it."""

    kind: str
    session: RLSession
    before: Drafter

    def after(self, folder: Path) -> Drafter:
        """The head as it is now, and the policy."""
        policy = self.session.export_hf(folder / "policy", dtype="float32")
        if self.kind in MTP:
            return MTP[self.kind](policy)
        head = self.session.export_hf(folder / "head", dtype="float32", draft=True)
        return Written(head, policy) if self.kind == "eagle" else WrittenEagle3(head, policy)


def start(kind: str, folder: Path) -> tuple[SessionConfig, Drafter]:
    """A session's settings, in which a head learns along, and the head."""
    if kind in MTP:
        taught_own_layer(folder, kind)
        return with_own_layer(folder, train=True), MTP[kind](folder)
    if kind == "eagle":
        taught(folder, MODEL_DIR, texts())
        return headed(folder, train=True), Written(folder)
    known = texts()
    used = sorted({token for tokens, _ in known for token in tokens})
    taught_eagle3(folder, MODEL_DIR, known, sorted(used[::4] + used[1::4] + used[2::4]))
    return headed(folder, train=True, algorithm="eagle3"), WrittenEagle3(folder)


@pytest.fixture(scope="module", params=list(KINDS))
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    kind = request.param
    folder = tmp_path_factory.mktemp(kind)
    config, before = start(kind, folder)
    config = config.replace("memory.device_gib", GIB)
    reward = is_odd if kind in MTP else None
    with RLSession.start(config, reward=reward) as session:
        session.snapshot("first")
        yield Running(kind, session, before)


def agree(rollout: Rollout, head: Drafter) -> tuple[float, int]:
    """The share of the passes that are as its formulas say, and how many tokens were accepted."""
    counts = [head.agreeing(sample, STEPS) for sample in rollout]
    same, passes = (sum(each) for each in zip(*counts, strict=True))
    accepted = sum(bool(place) for sample in rollout for place in sample.rollout_drafted or ())
    print(f"{same} of {passes} passes, {accepted} accepted")
    return same / passes, accepted


def test_the_engine_drafts_what_the_trainers_head_computes(
    running: Running, tmp_path: Path
) -> None:
    """Before training, and after it, when head and policy have moved."""
    session = running.session
    share, accepted = agree(written(session, 1.0), running.before)
    assert share >= AGREE
    assert accepted > 20
    session.train(3, show=False)
    share, accepted = agree(written(session, 1.0), running.after(tmp_path))
    assert share >= AGREE
    assert accepted > 20
    assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.parametrize("running", ["eagle", "eagle3"], indirect=True)
def test_the_likeliest_tokens_are_transformers(running: Running) -> None:
    """Not asked of models of random weights, whose logits are too near to each other."""
    running.session.restore("first")
    running.session.sync()
    rollout = written(running.session, 1e-5)
    for sample in rollout:
        prompt = sample.tokens[: -sample.response_length]
        assert sample.tokens == likeliest(MODEL_DIR, prompt, sample.response_length)[0]


@pytest.mark.parametrize("running", ["eagle", "eagle3", "MiMo"], indirect=True)
def test_syncs_reach_their_own_and_a_new_engine_has_what_was_learned(running: Running) -> None:
    """GLM-4.5's experts are fewer tensors in the engine than in the trainer."""
    running.session.restore("first")
    running.session.sync()
    syncs_reach_their_own(running.session)
    outlives_its_engine(running.session)
