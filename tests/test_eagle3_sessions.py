"""Each way to draft with an EAGLE-3 head in a session of its own; heads of each family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, make_draft
from kit.samples import Rollout
from kit.tiny import MODEL_DIR
from tests.conftest import Shared
from tests.drafting import TINY, outlives_its_kernel, plainly, same, written
from tests.heads import (
    WrittenEagle3,
    as_predicted,
    headed,
    likeliest,
    random_eagle3,
    taught_eagle3,
)
from tests.processes import last_words
from tests.small_models import make_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(shared: Shared) -> dict[float, Rollout]:
    return plainly(shared)


@pytest.fixture(scope="module")
def head(plain: dict[float, Rollout], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One whose words are all tokens."""
    texts = [(sample.tokens, sample.response_length) for sample in plain[1.0]]
    return taught_eagle3(tmp_path_factory.mktemp("head"), MODEL_DIR, texts[::4])


@pytest.mark.parametrize("steps", [1, 5])
def test_chains_of_any_length_draft_what_the_head_computes(
    plain: dict[float, Rollout], head: Path, steps: int
) -> None:
    with RLSession.start(headed(head, algorithm="eagle3", num_steps=steps)) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            assert as_predicted(rollout, WrittenEagle3(head), steps) > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 3, "eagle_topk": 2},
        {"num_steps": 2, "eagle_topk": 3, "num_draft_tokens": 5},
    ],
)
def test_trees_write_what_plain_decoding_writes_and_accept_more_than_chains(
    plain: dict[float, Rollout], head: Path, settings: dict[str, Any]
) -> None:
    model, steps = WrittenEagle3(head), settings["num_steps"]
    with RLSession.start(headed(head, algorithm="eagle3", **settings)) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            accepted = sum(bool(p) for s in rollout for p in s.rollout_drafted or ())
            chain = sum(bool(p) for s in rollout for p in model.drafted(s, steps))
            assert accepted >= chain


def test_of_prompts_that_are_read_in_parts_it_drafts_the_same(
    plain: dict[float, Rollout], head: Path
) -> None:
    config = headed(head, algorithm="eagle3")
    with RLSession.start(config.replace("engine.extra", {"chunked_prefill_size": 4})) as session:
        rollout = written(session, 1.0)
        same(rollout, plain[1.0])
        assert as_predicted(rollout, WrittenEagle3(head), 3) > 20


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Qwen3, layers unnamed"])
def test_heads_of_each_family_draft_what_the_trainer_computes(
    family: str, tmp_path: Path, plain: Any
) -> None:
    """Also where a head leaves it to SGLang which layers it reads."""
    model, kind = tmp_path / "model", family.partition(",")[0]
    make_model(model, kind, num_hidden_layers=8)
    texts = [likeliest(model, [5 + i, 9, 20 + i, 7], 24) for i in range(8)]
    head = taught_eagle3(tmp_path / "head", model, texts)
    if family != kind:
        settings = json.loads((head / "config.json").read_text())
        assert settings.pop("eagle_config")
        (head / "config.json").write_text(json.dumps(settings))
    config = headed(head, train=True, algorithm="eagle3").replace("model.name", str(model))
    config = config.replace("rollout.max_response_len", 24)
    with RLSession.start(config) as session:
        assert as_predicted(written(session, 0.2), WrittenEagle3(head, model), 3) > 0
        session.train(2, show=False)
        policy = session.export_hf(tmp_path / "policy", dtype="float32")
        trained = session.export_hf(tmp_path / "trained", dtype="float32", draft=True)
        assert as_predicted(written(session, 0.2), WrittenEagle3(trained, policy), 3) > 0
        assert session.check_mismatch(session.generate()).verdict == "pass"


def test_a_head_is_made_and_the_model_stays_as_it_is(tmp_path: Path, plain: Any) -> None:
    config = TINY.replace("training.rollout_batch_size", 8)
    report = make_draft(config, tmp_path / "head", algorithm="eagle3", steps=20)
    assert report.after[1] > report.before[1]
    assert "EAGLE-3 head of 1 layer" in str(report)
    with RLSession.start(headed(tmp_path / "head", algorithm="eagle3")) as session:
        rollout = session.generate()
        assert as_predicted(rollout, WrittenEagle3(tmp_path / "head"), 3) > 0
        assert session.check_mismatch(rollout).verdict == "pass"


DIES = """
import json, os, signal, sys
from tests.heads import headed
from tests.faults.interrupts import digests
from kit import RLSession
config = headed(sys.argv[1], train=True, algorithm="eagle3").replace("name", "dying-third")
session = RLSession.start(config)
session.step()
session.step()
print(json.dumps(digests(session)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_kernel_leaves_a_head_that_goes_on(tmp_path: Path, plain: Any) -> None:
    told = last_words(DIES, str(random_eagle3(tmp_path / "head", words=range(3, 80))))
    outlives_its_kernel("dying-third", told, tmp_path / "saved")


def test_two_trainers_train_one_head(tmp_path: Path, plain: Any) -> None:
    config = headed(random_eagle3(tmp_path / "head"), train=True, algorithm="eagle3")
    losses = []
    for trainers in (1, 2):
        with RLSession.start(config.replace("training.num_trainers", trainers)) as session:
            losses.append([session.step().metrics["train/draft_loss"] for _ in range(3)])
            assert session.sync(verify=True).verified
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
