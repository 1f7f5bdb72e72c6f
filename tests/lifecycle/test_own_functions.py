"""Advantages and losses of a user's own: they train, are logged, and are asked for again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit import RLSession, Rollout, SessionConfig
from kit.algo.own_loss import check_loss, token_loss
from kit.checkpoint import checkpoint
from kit.errors import CheckpointError, ConfigError, SessionError, StackError
from kit.lifecycle.checks import check_functions
from kit.rollout.batch import make_batch
from kit.samples import Sample
from kit.tracking.recorder import Recorder
from kit.tracking.run_folder import read_rows
from tests.trainer.trainers import PLAIN, Make, batch, make, weights

__all__ = ["make"]  # a fixture
TRAINING = SessionConfig.preset("tiny").training


def centred(rollout: Rollout) -> list[float]:
    return [sample.reward - rollout.mean_reward() for sample in rollout]


def policy_gradient(logp_T: Any, old_logp_T: Any, advantage_T: Any) -> Any:
    return -(logp_T - old_logp_T).exp() * advantage_T


def scored() -> Rollout:
    samples = [
        Sample(group_index=i // 2, index=i, tokens=[1, 2, 3], response_length=2, reward=float(i))
        for i in range(4)
    ]
    return Rollout(samples)


def test_a_function_makes_advantages_by_sample_or_by_token() -> None:
    made = make_batch(scored(), TRAINING, lambda *_: [], centred)
    assert made.advantages == (-1.5, -0.5, 0.5, 1.5)
    assert made.token_advantages is None
    rows = [[1.0, 3.0]] * 4
    by_token = make_batch(scored(), TRAINING, lambda *_: [], lambda _: torch.tensor(rows))
    assert by_token.token_advantages == ((1.0, 3.0),) * 4
    assert by_token.advantages == (2.0,) * 4
    whitened = TRAINING.model_copy(update={"normalize_advantages": True})
    made = make_batch(scored(), whitened, lambda *_: [], centred)
    assert sum(made.advantages) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ([1.0, 2.0], "2 numbers for 4 samples"),
        ([[1.0]] * 4, "rows of other lengths"),
        ([1.0, 2.0, 3.0, float("nan")], "not finite"),
    ],
)
def test_an_advantage_function_that_returns_something_else_is_refused(
    answer: Any, says: str
) -> None:
    with pytest.raises(SessionError, match=says):
        make_batch(scored(), TRAINING, lambda *_: [], lambda _: answer)


def test_functions_that_could_not_be_called_are_refused_before_the_start() -> None:
    with pytest.raises(ConfigError, match=r"parameter 'logp'.*(?s:.*)Did you mean 'logp_T'"):
        check_loss(lambda logp: logp)
    check_loss(lambda logp_T, scale=2.0: logp_T * scale)
    with pytest.raises(ConfigError, match="exclude each other"):
        check_functions(TRAINING.model_copy(update={"advantage_estimator": "ppo"}), centred, None)
    with pytest.raises(ConfigError, match="not a function"):
        check_functions(TRAINING, "grpo", None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda logp_T: logp_T.mean(), r"returned \(\) as the loss; \(3,\) is meant"),
        (lambda logp_T: (logp_T, {"a": 1.0}), "returned float as a"),
        (lambda advantage_T: advantage_T / 0 + [], "failed: TypeError"),
    ],
)
def test_a_loss_that_returns_something_else_is_refused(loss: Any, says: str) -> None:
    inputs = {"logp_T": torch.zeros(3), "advantage_T": torch.ones(3)}
    with pytest.raises(StackError, match=says):
        token_loss(loss, inputs)


def test_the_policy_gradient_as_an_own_loss_trains_as_the_kits_own(make: Make) -> None:
    trained = []
    for loss in (None, policy_gradient):
        trainer = make(**PLAIN, eps_clip=1.0, eps_clip_high=9.0)
        trainer.use(replace(trainer.settings, loss=loss))
        (metrics,), _ = trainer.update(batch(), "a")
        trained.append((weights(trainer), metrics["train/pg_loss"]))
    torch.testing.assert_close(trained[1], trained[0], rtol=0, atol=1e-7)


@pytest.mark.slow
def test_own_functions_train_are_logged_and_are_asked_for_again(tmp_path: Path) -> None:
    def loss(logp_T: Any, advantage_T: Any, old_logp_T: Any) -> Any:
        return policy_gradient(logp_T, old_logp_T, advantage_T), {"size": advantage_T.abs()}

    if other := RLSession.current():
        other.close(keep_warm=True)
    own: dict[str, Any] = {"advantage": centred, "loss": loss}
    with RLSession.start("tiny", **own) as session:
        session.debug.tracker.recorder = recorder = Recorder(tmp_path / "run")
        recorder.start(session.config, session.debug.state.inputs.described)
        step = session.step()
        batch = session.last_batch
        assert batch is not None
        assert batch.advantages == pytest.approx(centred(Rollout(batch.samples)))
        size = sum(map(abs, batch.advantages)) / len(batch)
        assert step.metrics["train/own/size"] == pytest.approx(size, rel=1e-4)
        assert "train/pg_clipfrac" not in step.metrics
        assert session.advantages(step.rollout, "rloo").advantages != batch.advantages
        path = session.save(tmp_path / "one")
        logged = read_rows(tmp_path / "run" / "inputs.jsonl")
        assert [(row["argument"], row["value"]["object"]) for row in logged] == [
            ("advantage", "centred"),
            ("loss", "loss"),
        ]
        session.debug.tracker.recorder = None
    assert checkpoint.read(path)[1]["inputs"].keys() == {"advantage", "loss"}
    asked = r"an advantage function \(centred\) and a loss function \(loss\)"
    with pytest.raises(CheckpointError, match=asked):
        RLSession.load(path)
