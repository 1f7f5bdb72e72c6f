"""Heads on a GPU, in sessions: the engine drafts what their formulas say, and they learn along."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts.comparison import alike, chi_square, differences
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
SUMS = [f"{a}+{3 * a % 90 + 7}=" for a in range(3, 67)]
DRAWN = 10_000
FIRST = (2, 4)
"""First tokens of a response that are compared as one."""
NEAR = 0.1
"""Nats between two tokens of which either may be the likeliest in bfloat16."""


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


@dataclass(frozen=True, slots=True)
class Responses:
    """What a session that has just begun writes."""

    likeliest: Rollout
    drawn: Rollout
    """By the seeds of its first step."""
    many: Rollout
    """First tokens of many responses to one prompt."""

    @classmethod
    def of(cls, session: RLSession, temperature: float) -> Responses:
        """Have it write them."""
        alone = {"n_samples_per_prompt": 1}
        return cls(
            session.generate(SUMS, temperature=0.0, **alone),
            session.generate(SUMS, temperature=temperature, **alone),
            session.generate(
                SUMS[1:2],
                n_samples_per_prompt=DRAWN,
                temperature=temperature,
                max_tokens=max(FIRST) + 1,
            ),
        )

    def table(self, length: int) -> list[list[Any]]:
        """(so many first tokens, how many responses have them, their log-prob)."""
        counts: Counter[tuple[int, ...]] = Counter()
        log_probs = {}
        for sample in self.many:
            first = tuple(sample.response_tokens[:length])
            counts[first] += 1
            log_probs[first] = sum((sample.rollout_log_probs or ())[:length])
        return [[first, count, log_probs[first]] for first, count in counts.items()]


def tokens_of(rollout: Rollout) -> dict[str, Any]:
    """Tokens and log-probs of its responses."""
    return {
        "tokens": [sample.response_tokens for sample in rollout],
        "log_probs": [sample.rollout_log_probs for sample in rollout],
    }


def start(kind: str, folder: Path) -> tuple[SessionConfig, Drafter]:
    """A session's settings, in which a head learns along, and the head."""
    torch.set_num_threads(1)  # many, of a large machine, make models as small as these slow
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


# ---- beside plain decoding ---------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Beside:
    """Settings of sessions that draft, and what one that does not has written."""

    kind: str
    config: SessionConfig
    temperature: float
    plain: Responses


@pytest.fixture(scope="module", params=list(KINDS))
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Beside:
    kind = request.param
    config, _ = start(kind, tmp_path_factory.mktemp(kind))
    config = config.replace("memory.device_gib", GIB).replace("training.draft", None)
    config = config.replace("engine.max_running_requests", len(SUMS))  # fewer graphs to capture
    temperature = 0.5 if kind in MTP else 2.0  # they draw some beginnings often, not all
    with RLSession.start(config.replace("engine.speculative", None)) as session:
        print(f"plain: started in {session.start_seconds:.0f} s")
        return Beside(kind, config, temperature, Responses.of(session, temperature))


@pytest.mark.parametrize("topk", [3, 1])
def test_what_is_written_is_plain_decodings(beside: Beside, topk: int) -> None:
    """Trees and chains: tokens but for last bits, and frequencies of what is drawn."""
    plain = beside.plain
    config = beside.config.replace("engine.speculative.eagle_topk", topk)
    with RLSession.start(config) as session:
        print(f"{topk} a step: started in {session.start_seconds:.0f} s")
        found = Responses.of(session, beside.temperature)
    for name in ("likeliest", "drawn", "many"):
        places = [place for s in getattr(found, name) for place in s.rollout_drafted or ()]
        print(f"{name}: {sum(map(bool, places))} of {len(places)} tokens were drafted")
        assert sum(map(bool, places)) > 20
    parted = differences(tokens_of(plain.likeliest), tokens_of(found.likeliest))
    ours, theirs = (tokens_of(of.drawn)["tokens"] for of in (plain, found))
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    tests = [chi_square(plain.table(length), found.table(length)) for length in FIRST]
    print(f"likeliest: {parted}")
    print(f"by seed: {same} of {len(ours)} the same, beginnings {alike(ours, theirs)}")
    print(f"chi-square of the first {FIRST} tokens: {tests}")
    assert parted["same"] > parted["of"] // 2
    if beside.kind != "Glm4Moe":  # of which a last bit may choose another expert
        assert all(gap < NEAR for _, gap in parted["gaps"])
    assert same > len(ours) // 2
    assert all(test["cells"] > 20 for test in tests)
    assert min(test["p"] for test in tests) > 1e-3
