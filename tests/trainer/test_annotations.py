"""The trainer's numbers for each token: they add up to what an update reports."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from kit.trainer.probes import Samples
from tests.trainer.test_estimators import logged
from tests.trainer.trainers import PLAIN, Make, batch, make

__all__ = ["make"]  # a fixture

MIS = {"level": "token", "mode": "mask", "low": 0.9, "high": 1.1}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"entropy_coef": 0.1},
        {"calculate_per_token_loss": True},
        {"advantage_estimator": "dr_grpo"},
        {"advantage_estimator": "gspo"},
        {"advantage_estimator": "cispo"},
        {"kl_loss_coef": 0.1, "kl_loss_type": "k3", "entropy_coef": 0.01},
        {"use_tis": True, "tis_clip": 1.5},
        {"mis": MIS},
        {"opsm_delta": 0.01},
        {"use_rollout_logprobs": True},
        {"global_batch_size": 4, "epochs_per_rollout": 2},
    ],
    ids=lambda settings: " ".join(settings) or "grpo",
)
def test_shares_of_the_loss_sum_to_that_of_the_first_optimizer_step(
    make: Make, settings: dict[str, Any]
) -> None:
    trainer = make(**PLAIN, **settings, max_tokens=20)  # several micro-batches
    given = logged(trainer, batch(), [0.3, -0.2, 0.02, 0.0, 0.15, -0.01, 0.4, -0.3])
    found = trainer.probes.annotate_batch(given, "a")["loss"]
    steps, _ = trainer.update(given, "a")
    first = range(settings.get("global_batch_size", 8))
    assert math.fsum(x for i in first for x in found[i]) == pytest.approx(
        steps[0]["train/loss"], abs=1e-6
    )
    assert [len(row) for row in found] == given.response_lengths
    for row, mask in zip(found, given.loss_masks, strict=True):
        assert all(x == 0 for x, active in zip(row, mask, strict=True) if not active)


def test_looking_leaves_an_update_as_it_is(make: Make) -> None:
    results = []
    for looks in (False, True):
        trainer = make(**PLAIN)
        if looks:
            trainer.probes.annotate_batch(batch(), "a")
            trainer.probes.annotate_samples(Samples(batch().tokens, batch().response_lengths))
        results.append(trainer.update(batch(), "a"))
    assert results[0] == results[1]


def test_a_batch_that_was_applied_has_no_loss_any_more(make: Make) -> None:
    trainer = make(**PLAIN)
    trainer.update(batch(), "a")
    assert set(trainer.probes.annotate_batch(batch(), "a")) == {"trainer_log_prob", "entropy"}
    assert "loss" in trainer.probes.annotate_batch(batch(), "b")


def test_entropy_is_that_of_the_whole_distribution(make: Make) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from kit.tiny import MODEL_DIR

    given = batch()
    found = make().probes.annotate_samples(Samples(given.tokens, given.response_lengths))
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    for row, length, entropy in zip(
        given.tokens, given.response_lengths, found["entropy"], strict=True
    ):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0, -length - 1 : -1] / 0.8
        expected = torch.distributions.Categorical(logits=logits).entropy()
        assert entropy == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_missing_log_prob_of_the_engine_is_named_as_an_update_would(make: Make) -> None:
    from kit.errors import StackError

    trainer = make(use_tis=True)
    with pytest.raises(StackError, match="rollout_log_probs"):
        trainer.probes.annotate_batch(replace(batch(), rollout_log_probs=None), "a")
