"""What estimators, corrections, critic and reference do to an update, in the trainer alone."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.algo.advantages import gae, token_rewards
from kit.config import TrainingConfig
from kit.errors import StackError
from kit.messages import TrainBatch
from kit.trainer.actor import Trainer
from kit.trainer.batch import optimizer_steps
from tests.trainer.trainers import PLAIN, Make, batch, make, weights

__all__ = ["make"]  # a fixture
WITH_CRITIC = {"advantage_estimator": "ppo", **PLAIN, "critic": {"learning_rate": 0.1}}


def logged(trainer: Trainer, given: TrainBatch, shift: list[float] | None = None) -> TrainBatch:
    """With engine log-probs that differ from the trainer's by this much a token, by sample."""
    rows = trainer.log_probs(given.tokens, given.response_lengths)
    shift = shift or [0.0] * len(given)
    moved = [[x - by for x in row] for row, by in zip(rows, shift, strict=True)]
    return replace(given, rollout_log_probs=moved)


def valued(trainer: Trainer, given: TrainBatch) -> TrainBatch:
    """With values, returns and advantages, as a session makes them."""
    values = trainer.values(given.tokens, given.response_lengths)
    value_T = torch.tensor([x for row in values for x in row])
    mask_T = torch.tensor([m for row in given.loss_masks for m in row])
    lengths = torch.tensor(given.response_lengths)
    sample_T = torch.repeat_interleave(torch.arange(len(given)), lengths)
    reward_T = token_rewards(
        torch.tensor(given.advantages), torch.zeros(len(mask_T)), sample_T, mask_T, 0.0
    )
    advantage_T, return_T = gae(value_T, reward_T, sample_T, mask_T, 1.0, 1.0)
    by_sample = [
        [part.tolist() for part in x.split(given.response_lengths)] for x in (advantage_T, return_T)
    ]
    return replace(given, values=values, token_advantages=by_sample[0], returns=by_sample[1])


def moved(make: Make, given: Any, **settings: Any) -> torch.Tensor:
    """Where one update takes the weights; `given` may be made by the trainer that starts."""
    trainer = make(**PLAIN | settings)
    trainer.update(given(trainer) if callable(given) else given, "a")
    return weights(trainer)


@pytest.mark.parametrize(
    ("settings", "factor"),
    [
        ({"use_tis": True, "tis_clip": 10.0}, 2.0),
        ({"use_tis": True, "tis_clip": 1.5}, 1.5),
        ({"mis": {"level": "token", "mode": "truncate", "high": 1.5}}, 1.5),
        ({"mis": {"level": "geometric", "mode": "clip", "high": 10.0}}, 2.0),
        ({"mis": {"level": "token", "high": 10.0, "batch_normalize": True}}, 1.0),
    ],
)
def test_importance_weights_multiply_the_policy_loss(
    make: Make, settings: dict[str, Any], factor: float
) -> None:
    log_two = [math.log(2)] * 8
    weighted = moved(make, lambda t: logged(t, batch(), log_two), **settings)
    by_hand = replace(batch(), advantages=[factor * a for a in batch().advantages])
    torch.testing.assert_close(weighted, moved(make, by_hand), rtol=0, atol=2e-6)
    assert not torch.allclose(weighted, weights(make()), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "rejected"),
    [
        ({"mis": {"level": "geometric", "mode": "mask", "high": 1.5}}, {0, 5}),
        ({"mis": {"level": "token", "high": 50.0, "veto": 0.5}}, {5}),
        ({"mis": {"level": "token", "high": 1.0, "low": 1.0, "mode": "clip",
                  "rs_level": "sequence", "rs_high": 5.0}}, {0, 5}),
        ({"opsm_delta": 0.1}, {6}),
    ],
)  # fmt: skip
def test_what_a_correction_rejects_does_not_train_and_still_counts(
    make: Make, settings: dict[str, Any], rejected: set[int]
) -> None:
    # Trainer above the engine in sample 0, below it in samples 5 and 6; sample 6 was bad.
    shift = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0]
    if "opsm_delta" in settings:
        shift = [0.5, 0.0, 0.0, 0.0, 0.0, -0.5, -0.5, 0.0]
    without = replace(
        batch(), advantages=[0.0 if i in rejected else a for i, a in enumerate(batch().advantages)]
    )
    left = moved(make, lambda t: logged(t, batch(), shift), **settings)
    expected = moved(make, without)
    if "veto" in settings.get("mis", {}):  # its weights are not all 1
        by_hand = [math.exp(s) * a for s, a in zip(shift, without.advantages, strict=True)]
        expected = moved(make, replace(without, advantages=by_hand))
    torch.testing.assert_close(left, expected, rtol=0, atol=2e-6)


def test_corrections_say_what_they_did(make: Make) -> None:
    trainer = make(mis={"mode": "mask", "high": 1.5}, opsm_delta=0.1)
    shift = [1.0, 0.0, 0.0, 0.0, 0.0, -1.0, -1.0, 0.0]
    (metrics,), _ = trainer.update(logged(trainer, batch(), shift), "a")
    assert 0 < metrics["train/mis/kept_fraction"] < 1
    assert 0 < metrics["train/opsm/masked_fraction"] < 1
    assert metrics["train/ess_ratio"] < 0.99


def test_without_a_difference_the_effective_sample_is_the_sample(make: Make) -> None:
    trainer = make()
    (metrics,), _ = trainer.update(logged(trainer, batch()), "a")
    assert metrics["train/ess_ratio"] == pytest.approx(1.0, abs=1e-9)
    assert metrics["train/ppo_kl"] == pytest.approx(0.0, abs=1e-9)


def test_the_engines_log_probs_can_be_the_old_ones(make: Make) -> None:
    trainer = make(use_rollout_logprobs=True, calculate_per_token_loss=True)
    (metrics,), _ = trainer.update(logged(trainer, batch(), [0.1] * 8), "a")
    assert metrics["train/ppo_kl"] == pytest.approx(-0.1, abs=1e-6)


@pytest.mark.parametrize(
    "settings",
    [{"use_tis": True}, {"mis": {}}, {"opsm_delta": 0.1}, {"use_rollout_logprobs": True}],
)
def test_a_correction_without_engine_log_probs_is_refused(
    make: Make, settings: dict[str, Any]
) -> None:
    with pytest.raises(StackError, match="rollout_log_probs"):
        make(**settings).update(batch(), "a")


def test_a_loss_over_a_constant_length_weighs_long_samples_more(make: Make) -> None:
    # Every trained token counts 1 / constant / samples; the helper's constant is 1.
    per_token = [a * sum(m) for a, m in zip(batch().advantages, batch().loss_masks, strict=True)]
    left = moved(make, batch(), advantage_estimator="dr_grpo")
    torch.testing.assert_close(
        left, moved(make, replace(batch(), advantages=per_token)), rtol=0, atol=2e-6
    )


@pytest.mark.parametrize("estimator", ["gspo", "cispo"])
def test_at_the_first_step_gspo_and_cispo_have_grpos_gradient(make: Make, estimator: str) -> None:
    left = moved(make, batch(), advantage_estimator=estimator)
    torch.testing.assert_close(left, moved(make, batch()), rtol=0, atol=2e-6)


def test_advantages_by_token_are_those_of_the_sample_where_they_are_alike(make: Make) -> None:
    rows = [[a] * n for a, n in zip(batch().advantages, batch().response_lengths, strict=True)]
    by_token = replace(batch(), advantages=[0.0] * 8, token_advantages=rows)
    assert torch.equal(moved(make, by_token), moved(make, batch()))


def test_epochs_go_over_the_rollout_again_in_a_new_order(make: Make) -> None:
    trainer = make(epochs_per_rollout=3, global_batch_size=4, learning_rate=1e-4)
    metrics, _ = trainer.update(batch(), "a")
    assert len(metrics) == trainer.state.optimizer_steps == 6
    assert metrics[0]["train/ppo_kl"] == 0.0
    assert metrics[-1]["train/ppo_kl"] != 0.0
    steps = optimizer_steps(8, trainer.settings.training, "seed")
    assert steps[:2] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    for epoch in (steps[:2], steps[2:4], steps[4:]):
        assert sorted(i for step in epoch for i in step) == list(range(8))
    assert steps[2:4] != steps[:2]
    assert optimizer_steps(8, trainer.settings.training, "seed") == steps
    assert optimizer_steps(8, trainer.settings.training, "other") != steps


def test_the_reference_follows_every_so_many_updates(make: Make) -> None:
    trainer = make(learning_rate=1e-3, kl_coef=0.1, ref_update_interval=2)
    given = batch()
    start = trainer.log_probs(given.tokens, given.response_lengths, "reference")
    trainer.update(given, "a")
    assert trainer.log_probs(given.tokens, given.response_lengths, "reference") == start
    trainer.update(given, "b")
    now = trainer.log_probs(given.tokens, given.response_lengths)
    assert trainer.log_probs(given.tokens, given.response_lengths, "reference") == now != start


def test_a_new_critic_expects_nothing_and_learns_the_returns(make: Make) -> None:
    trainer = make(**WITH_CRITIC)
    given = batch()
    before = trainer.values(given.tokens, given.response_lengths)
    assert [len(row) for row in before] == given.response_lengths
    assert {x for row in before for x in row} == {0.0}
    (first,), _ = trainer.update(valued(trainer, given), "a")
    losses = [first["train/value_loss"]]
    for i in range(12):
        (metrics,), _ = trainer.update(valued(trainer, given), str(i))
        losses.append(metrics["train/value_loss"])
    assert losses[0] == pytest.approx(sum(a**2 / 2 for a in given.advantages) / 8, rel=1e-5)
    assert losses[-1] < 0.8 * losses[0]
    assert first["train/critic_grad_norm"] > 0


def test_while_the_critic_warms_up_the_policy_stands_still(make: Make) -> None:
    trainer = make(**WITH_CRITIC | {"critic": {"learning_rate": 0.1, "warmup_rollouts": 1}})
    start = weights(trainer).clone()
    (metrics,), _ = trainer.update(valued(trainer, batch()), "a")
    assert torch.equal(weights(trainer), start)
    assert metrics["train/lr"] == 0.0
    assert trainer.state.optimizer_steps == 0
    assert any(x for row in trainer.values(batch().tokens, batch().response_lengths) for x in row)
    trainer.update(valued(trainer, batch()), "b")
    assert not torch.equal(weights(trainer), start)


def test_a_policy_does_not_wait_for_a_critic_that_was_not_started(make: Make) -> None:
    critic = {"learning_rate": 0.1, "warmup_rollouts": 5}
    trainer = make(learning_rate=1e-3)
    start = weights(trainer).clone()
    training = TrainingConfig(**WITH_CRITIC | {"critic": critic})
    trainer.configure(training, 0.8)  # as a checkpoint of such a session does that is restored
    trainer.update(batch(), "a")
    assert not torch.equal(weights(trainer), start)


def test_the_critic_changes_nothing_in_the_policys_update(make: Make) -> None:
    given = batch()
    trainer = make(**WITH_CRITIC)
    with_values = valued(trainer, given)
    trainer.update(with_values, "a")
    left = weights(trainer).clone()
    plain = replace(with_values, values=None, returns=None)
    torch.testing.assert_close(left, moved(make, plain), rtol=0, atol=2e-6)


def test_a_loaded_critic_and_reference_go_on_where_the_saved_ones_would(
    make: Make, tmp_path: Path
) -> None:
    settings = WITH_CRITIC | {"kl_coef": 0.1, "ref_update_interval": 1, "epochs_per_rollout": 2}
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    trainer = make(**settings)
    trainer.update(valued(trainer, batch(0)), "a")
    trainer.save(str(folder))
    given = valued(trainer, batch(1))
    asked = (given.tokens, given.response_lengths, "reference")
    reference = trainer.log_probs(*asked)
    metrics, _ = trainer.update(given, "b")
    after, values = weights(trainer).clone(), trainer.values(*asked[:2])

    other = make(**settings)
    other.load(str(folder))
    assert other.log_probs(*asked) == reference
    assert other.update(given, "b") == (metrics, True)
    assert torch.equal(weights(other), after)
    assert other.values(*asked[:2]) == values


def test_values_without_a_critic_name_the_setting(make: Make) -> None:
    with pytest.raises(StackError, match="advantage_estimator: ppo"):
        make().values([[1, 2]], [1])


def test_a_batch_without_values_is_refused_by_a_trainer_with_a_critic(make: Make) -> None:
    trainer = make(**WITH_CRITIC)
    before = weights(trainer).clone()
    with pytest.raises(StackError, match=r"session\.advantages"):
        trainer.update(batch(), "a")
    assert torch.equal(weights(trainer), before)


def test_with_one_optimizer_step_grpo_gspo_and_cispo_train_alike_and_no_clip_range_is_felt(
    make: Make,
) -> None:
    def trained(**settings: Any) -> torch.Tensor:
        trainer = make(**PLAIN | settings)
        trainer.update(batch(), "a")
        return weights(trainer)

    usual = trained()
    for settings in (
        {"advantage_estimator": "gspo"},
        {"advantage_estimator": "cispo", "eps_clip": 0.01},
        {"eps_clip": 0.01, "eps_clip_high": 0.01, "eps_clip_c": 1.5},
    ):
        assert TrainingConfig(**settings).as_felt() == TrainingConfig().as_felt()
        torch.testing.assert_close(trained(**settings), usual, rtol=0, atol=1e-6)
        several = TrainingConfig(**settings, global_batch_size=64)
        assert several.as_felt() == several
    apart = [trained(global_batch_size=4, **s) for s in ({}, {"eps_clip": 1e-4})]
    assert (apart[0] - apart[1]).abs().max() > 1e-4


def test_gspo_is_told_from_grpo_where_tokens_have_weights_of_their_own() -> None:
    weighed = TrainingConfig(advantage_estimator="gspo", use_tis=True)
    assert weighed.as_felt() != TrainingConfig(use_tis=True).as_felt()
    rollout = TrainingConfig(eps_clip=0.1, use_rollout_logprobs=True)
    assert rollout.as_felt() == rollout
