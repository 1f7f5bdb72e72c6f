"""Each way to draft with a head in a session of its own; heads of each family; one that is made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit import RLSession, make_draft
from kit.samples import Rollout
from tests.conftest import Shared
from tests.drafting import TINY, draft_of, outlives_its_kernel, plainly, same, written
from tests.heads import Written, as_predicted, headed, likeliest, random_head, taught, taught_by
from tests.processes import last_words
from tests.small_models import make_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def plain(shared: Shared) -> dict[float, Rollout]:
    return plainly(shared)


@pytest.fixture(scope="module")
def head(plain: dict[float, Rollout], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_by(plain[1.0], tmp_path_factory.mktemp("head"))


@pytest.mark.parametrize("steps", [1, 5])
def test_chains_of_any_length_draft_what_the_head_computes(
    plain: dict[float, Rollout], head: Path, steps: int
) -> None:
    with RLSession.start(headed(head, num_steps=steps)) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            assert as_predicted(rollout, Written(head), steps) > 20


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
    model, steps = Written(head), settings["num_steps"]
    with RLSession.start(headed(head, **settings)) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            accepted = sum(bool(p) for s in rollout for p in s.rollout_drafted or ())
            chain = sum(bool(p) for s in rollout for p in model.drafted(s, steps))
            assert accepted >= chain


def test_of_prompts_that_are_read_in_parts_it_drafts_the_same(
    plain: dict[float, Rollout], head: Path
) -> None:
    config = headed(head).replace("engine.extra", {"chunked_prefill_size": 4})
    with RLSession.start(config) as session:
        rollout = written(session, 1.0)
        same(rollout, plain[1.0])
        assert as_predicted(rollout, Written(head), 3) > 20


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "MiMo"])
def test_heads_of_each_family_draft_what_the_trainer_computes(
    family: str, tmp_path: Path, plain: Any
) -> None:
    model = tmp_path / "model"
    make_model(model, family)
    texts = [likeliest(model, [5 + i, 9, 20 + i, 7], 24) for i in range(8)]
    head = taught(tmp_path / "head", model, texts)
    config = headed(head, train=True).replace("model.name", str(model))
    config = config.replace("rollout.max_response_len", 24)
    with RLSession.start(config) as session:
        as_predicted(written(session, 1.0), Written(head, model), 3)
        session.train(2, show=False)
        policy = session.export_hf(tmp_path / "policy", dtype="float32")
        trained = session.export_hf(tmp_path / "trained", dtype="float32", draft=True)
        rollout = written(session, 0.2)
        assert as_predicted(rollout, Written(trained, policy), 3) > 0
        assert session.check_mismatch(session.generate()).verdict == "pass"


def test_a_head_is_made_and_the_model_stays_as_it_is(tmp_path: Path, plain: Any) -> None:
    config = TINY.replace("training.rollout_batch_size", 8)
    report = make_draft(config, tmp_path / "head", algorithm="eagle", steps=20)
    assert report.after[1] > report.before[1]
    assert f"{{algorithm: eagle, draft_model: {tmp_path / 'head'}}}" in str(report)
    with RLSession.start(headed(tmp_path / "head")) as session:
        rollout = session.generate()
        assert as_predicted(rollout, Written(tmp_path / "head"), 3) > 0
        assert session.check_mismatch(rollout).verdict == "pass"


DIES = """
import json, os, signal, sys
from tests.heads import headed
from tests.faults.interrupts import digests
from kit import RLSession
config = headed(sys.argv[1], train=True).replace("name", "dying-heads")
session = RLSession.start(config)
session.step()
session.step()
print(json.dumps(digests(session)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_kernel_leaves_a_head_that_goes_on(tmp_path: Path, plain: Any) -> None:
    told = last_words(DIES, str(random_head(tmp_path / "head")))
    outlives_its_kernel("dying-heads", told, tmp_path / "saved")


def test_a_warm_stack_has_the_head_of_the_files_again(tmp_path: Path, plain: Any) -> None:
    folder = random_head(tmp_path / "head")
    found = []
    for train in (True, True, False):
        with RLSession.start(headed(folder, train=train)) as session:
            found.append(draft_of(session))
            if train:
                session.step()
                assert draft_of(session) != found[-1]
            session.close(keep_warm=True)
    assert found[0] == found[1] == found[2]


def test_two_trainers_train_one_head(tmp_path: Path, plain: Any) -> None:
    config = headed(random_head(tmp_path / "head"), train=True)
    losses = []
    for trainers in (1, 2):
        with RLSession.start(config.replace("training.num_trainers", trainers)) as session:
            losses.append([session.step().metrics["train/draft_loss"] for _ in range(3)])
            assert session.sync(verify=True).verified
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
