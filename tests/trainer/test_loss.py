"""The loss of a micro-batch: its share, its metrics, and what stands on masked tokens."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import tensor

from kit.config import TrainingConfig
from kit.trainer.loss import LossSettings, TokenInputs, policy_loss

SAMPLE = tensor([0, 0, 0, 1, 1])
INPUTS = TokenInputs(
    advantage_R=tensor([1.0, 1.0, 1.0, -2.0, -2.0]),
    mask_R=tensor([1.0, 0.0, 1.0, 1.0, 0.0]),
    old_logp_R=tensor([-1.0, -1.0, -2.0, -0.5, -0.5]),
    ref_logp_R=tensor([-1.5, -1.0, -1.0, -0.5, -0.5]),
    rollout_logp_R=tensor([-1.0, -1.0, -2.5, -0.5, -0.5]),
    weight_R=torch.ones(5),
    keep_R=torch.ones(5),
)
LOGP = tensor([-0.5, -1.0, -2.0, -0.4, -0.5])
ENTROPY = tensor([1.0, 9.0, 2.0, 3.0, 9.0])
TRAINING = TrainingConfig(kl_loss_coef=0.1, kl_loss_type="k1", entropy_coef=0.01)


def run(
    inputs: TokenInputs, logp: torch.Tensor = LOGP, training: TrainingConfig = TRAINING
) -> tuple[dict[str, float], torch.Tensor]:
    logp = logp.clone().requires_grad_()
    loss, metrics = policy_loss(logp, ENTROPY, SAMPLE, inputs, LossSettings(training, 2, 3))
    loss.backward()
    assert logp.grad is not None
    return metrics, logp.grad


def test_loss_and_metrics_are_those_worked_out_by_hand() -> None:
    metrics, _ = run(INPUTS)
    up, down = math.exp(0.5), math.exp(0.1)
    # Two samples; the first trains two tokens, the second one.
    assert metrics["train/pg_loss"] == pytest.approx(((-1.28 - 1.0) / 2 + 2 * down) / 2, abs=1e-6)
    assert metrics["train/pg_clipfrac"] == pytest.approx(0.25)
    assert metrics["train/ppo_kl"] == pytest.approx((-0.5 / 2 - 0.1) / 2)
    assert metrics["train/entropy_loss"] == pytest.approx(((1 + 2) / 2 + 3) / 2)
    kl = ((up * 1.0 + 1.0 * -1.0) / 2 + down * 0.1) / 2
    assert metrics["train/kl_loss"] == pytest.approx(kl)
    assert metrics["train/train_rollout_logprob_abs_diff"] == pytest.approx(0.5 / 2 / 2)
    k3 = math.exp(0.5) - 1 - 0.5
    assert metrics["train/train_rollout_kl"] == pytest.approx(k3 / 2 / 2)
    total = metrics["train/pg_loss"] + 0.1 * kl - 0.01 * metrics["train/entropy_loss"]
    assert metrics["train/loss"] == pytest.approx(total)


def test_per_token_loss_weighs_all_tokens_of_the_batch_alike() -> None:
    metrics, _ = run(
        INPUTS, training=TRAINING.model_copy(update={"calculate_per_token_loss": True})
    )
    assert metrics["train/entropy_loss"] == pytest.approx((1 + 2 + 3) / 3)


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", [f.name for f in fields(TokenInputs) if f.name != "mask_R"])
def test_masked_tokens_poison_neither_metrics_nor_gradient(name: str, poison: float) -> None:
    spoiled = getattr(INPUTS, name).clone()
    spoiled[INPUTS.mask_R == 0] = poison
    training = TRAINING.model_copy(update={"kl_loss_type": "k3"})
    clean_metrics, clean_gradient = run(INPUTS, training=training)
    metrics, gradient = run(replace(INPUTS, **{name: spoiled}), training=training)
    assert metrics == clean_metrics
    assert torch.equal(gradient, clean_gradient)


def test_masked_log_probs_poison_nothing_and_have_no_gradient() -> None:
    logp = LOGP.clone()
    logp[INPUTS.mask_R == 0] = -math.inf
    metrics, gradient = run(INPUTS, logp)
    assert metrics == run(INPUTS)[0]
    assert gradient[INPUTS.mask_R == 0].tolist() == [0.0, 0.0]
    assert gradient.isfinite().all()


def test_without_old_log_probs_the_ratio_is_one_and_the_gradient_that_of_reinforce() -> None:
    inputs = replace(INPUTS, old_logp_R=None, ref_logp_R=None, rollout_logp_R=None)
    metrics, gradient = run(inputs)
    assert (metrics["train/ppo_kl"], metrics["train/pg_clipfrac"]) == (0.0, 0.0)
    assert gradient.tolist() == pytest.approx([-0.25, 0.0, -0.25, 1.0, 0.0])
    assert "train/kl_loss" not in metrics
