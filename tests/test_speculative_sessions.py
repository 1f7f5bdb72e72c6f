"""Each way to draft in a session of its own: chains, trees, n-grams, a draft that is made."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, SessionConfig, make_draft
from kit.drafts import shorten
from kit.samples import Rollout
from kit.tiny import MODEL_DIR
from tests.conftest import Shared
from tests.drafting import (
    PROMPTS,
    TEMPERATURES,
    TINY,
    draft_of,
    drafting,
    outlives_its_kernel,
    plainly,
    same,
    written,
)
from tests.processes import last_words

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def plain(shared: Shared) -> dict[float, Rollout]:
    return plainly(shared)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 1},
        {"num_steps": 3, "eagle_topk": 2},
        {"num_steps": 2, "eagle_topk": 3, "num_draft_tokens": 5},
    ],
)
def test_chains_and_trees_write_what_plain_decoding_writes(
    plain: dict[float, Rollout], settings: dict[str, Any]
) -> None:
    with RLSession.start(drafting(MODEL_DIR, **settings)) as session:
        session.snapshot("first")
        for temperature, expected in plain.items():
            same(written(session, temperature), expected)
        for limit in (3, 4, 5, 6):
            session.restore("first")  # the next responses have the seeds of the first ones
            cut = session.generate(PROMPTS, temperature=1.0, max_tokens=limit)
            pairs = zip(cut, plain[1.0], strict=True)
            assert all(a.response_tokens == b.response_tokens[:limit] for a, b in pairs)
        # The model drafts for itself: of its likeliest tokens all are accepted.
        counts = [s.spec_info for s in written(session, 1e-5) if s.spec_info]
        steps = session.config.engine.speculative.steps
        passes = sum(c["verify_ct"] for c in counts)
        assert sum(c["num_correct_drafts"] for c in counts) == passes * steps
        session.train(2, show=False)
        assert session.check_mismatch(session.generate()).verdict == "pass"


def test_where_it_pays_drafts_write_what_plain_decoding_writes(
    plain: dict[float, Rollout],
) -> None:
    """The first passes draft, then some do not; on a CPU, whose model is tiny, most do not."""
    with RLSession.start(drafting(MODEL_DIR, when="auto")) as session:
        session.snapshot("first")
        counts: Counter[str] = Counter()
        for _ in range(8):
            for sample in session.generate(PROMPTS, temperature=5.0):  # which is long
                counts.update(sample.spec_info)
            session.restore("first")
            for temperature, expected in plain.items():
                same(written(session, temperature), expected)
        assert 0 < counts["verify_ct"] < counts["passes"]
        assert counts["us"] > 0
        assert counts["plain_us"] > 0
        session.train(2, show=False)
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"


def test_ngrams_write_what_plain_decoding_writes(plain: dict[float, Rollout]) -> None:
    config = TINY.replace("name", "ngrams").replace("engine.speculative", {"algorithm": "ngram"})
    with RLSession.start(config) as session:
        for temperature, expected in plain.items():
            same(written(session, temperature), expected)
        session.train(2, show=False)
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"


@pytest.mark.parametrize("draft", [None, MODEL_DIR], ids=["ngram", "standalone"])
def test_with_adapters_merged_drafts_write_what_plain_decoding_writes(
    draft: Path | None, tmp_path: Path
) -> None:
    """The draft is the model without its adapter, and some of what it drafts is refused."""
    tiny = SessionConfig.preset("tiny-lora").replace("engine.replicas", 1)
    with RLSession.start(tiny) as session:
        session.train(3, show=False)
        adapter = session.export_hf(tmp_path / "adapter", adapter=True)
    trained = tiny.replace("model.lora.adapter_path", str(adapter))
    with RLSession.start(trained) as session:
        expected = {temperature: written(session, temperature) for temperature in TEMPERATURES}
    own: dict[str, Any] = {"algorithm": "ngram"}
    if draft:
        own = {"algorithm": "standalone", "draft_model": str(draft)}
    with RLSession.start(trained.replace("engine.speculative", own)) as session:
        for temperature, plain in expected.items():
            same(written(session, temperature), plain)
        session.step()
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"


def test_a_draft_is_made_and_the_model_stays_as_it_is(tmp_path: Path) -> None:
    seen: list[int] = []
    config = TINY.replace("training.rollout_batch_size", 8)
    report = make_draft(
        config, tmp_path / "draft", steps=12, on_step=lambda step: seen.append(step.step)
    )
    assert len(seen) == 12
    assert report.after[1] > report.before[1] > 0
    assert f"draft_model: {tmp_path / 'draft'}" in str(report)
    with RLSession.start(drafting(tmp_path / "draft")) as session:
        rollout = session.generate()
        assert session.check_mismatch(rollout).verdict == "pass"


DIES = """
import json, os, signal, sys
from tests.drafting import drafting
from tests.faults.interrupts import digests
from kit import RLSession
session = RLSession.start(drafting(sys.argv[1], train=True).replace("name", "dying-drafts"))
session.step()
session.step()
print(json.dumps(digests(session)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_kernel_leaves_a_draft_that_goes_on(tmp_path: Path, plain: Any) -> None:
    folder = tmp_path / "draft"
    shorten(MODEL_DIR, folder, 1)
    told = last_words(DIES, str(folder))
    outlives_its_kernel("dying-drafts", told, tmp_path / "saved")


def test_a_warm_stack_has_the_draft_of_the_files_again(tmp_path: Path, plain: Any) -> None:
    folder = tmp_path / "draft"
    shorten(MODEL_DIR, folder, 1)
    found = []
    for train in (True, True, False):
        with RLSession.start(drafting(folder, train=train)) as session:
            found.append(draft_of(session))
            if train:
                session.step()
                assert draft_of(session) != found[-1]
            session.close(keep_warm=True)
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("loss", ["cross_entropy", "forward_kl"])
def test_two_trainers_train_one_draft(tmp_path: Path, loss: str) -> None:
    folder = tmp_path / "draft"
    shorten(MODEL_DIR, folder, 1)
    config = drafting(folder, train=True).replace("training.draft.loss", loss)
    losses = []
    for trainers in (2, 1):
        with RLSession.start(config.replace("training.num_trainers", trainers)) as session:
            losses.append(session.train(2, show=False).curve("train/draft_loss"))
            assert session.sync(verify=True).verified
    # The first step's samples are the same, and the weights after it nearly so.
    assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-4)
    assert losses[0][1] == pytest.approx(losses[1][1], rel=0.1)
