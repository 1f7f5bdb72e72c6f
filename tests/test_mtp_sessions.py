"""Each way to draft with a model's own layer in a session of its own, and what comes after it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kit import RLSession
from kit.samples import Rollout
from tests.drafting import draft_of, outlives_its_kernel, same, written
from tests.heads import (
    WrittenGlm,
    WrittenMtp,
    as_predicted,
    is_odd,
    taught_own_layer,
    with_own_layer,
)
from tests.processes import last_words
from tests.small_models import make_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("alone")]


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return taught_own_layer(tmp_path_factory.mktemp("mimo"))


@pytest.fixture(scope="module")
def plain(mimo: Path) -> dict[float, Rollout]:
    """What plain decoding writes, by temperature."""
    with RLSession.start(with_own_layer(mimo).replace("engine.speculative", None)) as session:
        return {temperature: written(session, temperature) for temperature in (1.0, 0.2, 1e-5)}


@pytest.mark.parametrize("steps", [1, 5])
def test_chains_of_any_length_draft_what_the_layer_computes(
    mimo: Path, plain: dict[float, Rollout], steps: int
) -> None:
    with RLSession.start(with_own_layer(mimo, num_steps=steps)) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            assert as_predicted(rollout, WrittenMtp(mimo), steps) > 20


@pytest.mark.parametrize(
    "settings",
    [
        {"num_steps": 3, "eagle_topk": 2},
        {"num_steps": 2, "eagle_topk": 3, "num_draft_tokens": 5},
    ],
)
def test_trees_write_what_plain_decoding_writes_and_accept_more_than_chains(
    mimo: Path, plain: dict[float, Rollout], settings: dict[str, Any]
) -> None:
    model = WrittenMtp(mimo)
    with RLSession.start(with_own_layer(mimo, **settings)) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            accepted = sum(bool(p) for s in rollout for p in s.rollout_drafted or ())
            chain = sum(bool(p) for s in rollout for p in model.drafted(s, settings["num_steps"]))
            assert accepted >= chain


def test_of_prompts_that_are_read_in_parts_it_drafts_the_same(
    mimo: Path, plain: dict[float, Rollout]
) -> None:
    config = with_own_layer(mimo).replace("engine.extra", {"chunked_prefill_size": 4})
    with RLSession.start(config) as session:
        rollout = written(session, 1.0)  # the first, by whose seeds the other was written
        same(rollout, plain[1.0])
        assert as_predicted(rollout, WrittenMtp(mimo), 3) > 20


@pytest.mark.parametrize("trains", [False, True])
def test_an_export_drafts_as_the_session_did(mimo: Path, tmp_path: Path, trains: bool) -> None:
    """With the layer as it was trained, or as it was; also of a session that does not draft."""
    config = with_own_layer(mimo, train=trains)
    if not trains:
        config = config.replace("engine.speculative", None)
    with RLSession.start(config, reward=is_odd) as session:
        session.train(2, show=False)
        exported = session.export_hf(tmp_path / "exported", dtype="float32")
        expected = written(session, 1e-5)  # seeds go by a session's steps
    with RLSession.start(with_own_layer(exported)) as session:
        rollout = written(session, 1e-5)
        assert [s.tokens for s in rollout] == [s.tokens for s in expected]
        assert as_predicted(rollout, WrittenMtp(exported), 3) > 20
        if trains:
            assert [s.rollout_drafted for s in rollout] == [s.rollout_drafted for s in expected]


def test_a_layer_with_experts_drafts_what_the_trainer_computes(tmp_path: Path) -> None:
    """GLM-4.5's; before training and after it."""
    model = taught_own_layer(tmp_path / "model", "Glm4Moe")
    with RLSession.start(with_own_layer(model).replace("engine.speculative", None)) as session:
        plain = {temperature: written(session, temperature) for temperature in (1.0, 0.2)}
    with RLSession.start(with_own_layer(model, train=True), reward=is_odd) as session:
        for temperature, expected in plain.items():
            rollout = written(session, temperature)
            same(rollout, expected)
            assert as_predicted(rollout, WrittenGlm(model), 3) > 20
        session.train(2, show=False)
        exported = session.export_hf(tmp_path / "exported", dtype="float32")
        assert as_predicted(written(session, 0.2), WrittenGlm(exported), 3) > 20
        assert session.sync(verify=True).verified
        assert session.check_mismatch(session.generate()).verdict == "pass"
    with RLSession.start(with_own_layer(exported)) as session:
        assert as_predicted(written(session, 0.2), WrittenGlm(exported), 3) > 20


DIES = """
import json, os, signal, sys
from tests.heads import with_own_layer
from tests.faults.interrupts import digests
from kit import RLSession
config = with_own_layer(sys.argv[1], train=True).replace("name", "dying-layers")
session = RLSession.start(config)
session.step()
session.step()
print(json.dumps(digests(session)), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_kernel_leaves_a_layer_that_goes_on(tmp_path: Path, plain: Any) -> None:
    told = last_words(DIES, str(make_model(tmp_path / "mimo", "MiMo")))
    outlives_its_kernel("dying-layers", told, tmp_path / "saved")


def test_a_warm_stack_has_the_layer_of_the_files_again(mimo: Path, plain: Any) -> None:
    found = []
    for train in (True, True, False):
        with RLSession.start(with_own_layer(mimo, train=train)) as session:
            found.append(draft_of(session))
            if train:
                session.step()
                assert draft_of(session) != found[-1]
            session.close(keep_warm=True)
    assert found[0] == found[1] == found[2]


def test_two_trainers_train_one_layer(mimo: Path, plain: Any) -> None:
    config = with_own_layer(mimo, train=True)
    losses = []
    for trainers in (1, 2):
        own = config.replace("training.num_trainers", trainers)
        with RLSession.start(own, reward=is_odd) as session:
            losses.append([session.step().metrics["train/draft_loss"] for _ in range(3)])
            assert session.sync(verify=True).verified
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
