"""Updates of a mixture of experts: which passes follow a record, and what is measured of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from kit.errors import StackError
from kit.messages import ExpertRecords, TrainBatch
from kit.trainer.actor import Trainer
from kit.trainer.probes import Samples
from kit.trainer.scoring import Rows
from tests.small_models import mixture_of_experts
from tests.trainer.trainers import PLAIN, Make, batch, make, weights

__all__ = ["make"]  # a fixture

DENSE_FIRST = {"num_hidden_layers": 3, "mlp_only_layers": [0]}
TWO_STEPS = {"rollout_batch_size": 2, "n_samples_per_prompt": 4, "global_batch_size": 4}
REPLAY = {"use_rollout_routing_replay": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture_of_experts(tmp_path_factory.mktemp("experts"), **DENSE_FIRST)


def samples(of: TrainBatch, experts: ExpertRecords = None) -> Samples:
    return Samples(of.tokens, of.response_lengths, experts)


def own_experts(trainer: Trainer, of: TrainBatch) -> list[np.ndarray]:
    routed = trainer.probe("routing", samples(of), 0.8)
    assert routed is not None
    return routed.experts


def others(records: list[np.ndarray]) -> list[np.ndarray]:
    """Records with each expert's number one higher, of four."""
    return [((r + 1) % 4).astype(np.uint8) for r in records]


def largest_gap(one: Rows, other: Rows) -> float:
    pairs = (zip(a, b, strict=True) for a, b in zip(one, other, strict=True))
    return max(abs(x - y) for pair in pairs for x, y in pair)


def test_an_update_that_replays_the_own_choice_is_the_same_to_the_bit(
    make: Make, folder: Path
) -> None:
    trained, metrics = [], []
    for replays in (False, True):
        trainer = make(folder, **PLAIN, **({} if not replays else REPLAY))
        work = batch()
        if replays:
            work = replace(work, experts=own_experts(trainer, work), replayed=True)
        metrics.append(trainer.update(work, "one")[0][0])
        trained.append(weights(trainer))
    assert torch.equal(*trained)
    routing = {name: metrics[1].pop(name) for name in [*metrics[1]] if "routing" in name}
    # Afterwards it is measured by the same experts, or by what the new weights choose.
    assert metrics[0].pop("train/update_kl") > 0
    assert metrics[1].pop("train/update_kl") > 0
    assert metrics[0] == metrics[1]
    assert routing == {
        "train/routing/overlap": 1.0,
        "train/routing/changed_frac": 0.0,
        "train/routing/contradicted_frac": 0.0,
    }


def test_a_record_that_is_not_replayed_is_measured_and_changes_no_bit(
    make: Make, folder: Path
) -> None:
    trained, metrics = [], []
    for recorded in (False, True):
        trainer = make(folder, **PLAIN)
        work = batch()
        if recorded:
            work = replace(work, experts=others(own_experts(trainer, work)))
        metrics.append(trainer.update(work, "one")[0][0])
        trained.append(weights(trainer))
    assert torch.equal(*trained)
    assert metrics[1]["train/routing/changed_frac"] > 0.9
    assert metrics[1]["train/routing/overlap"] < 0.7


def test_policy_passes_follow_the_record_and_those_of_reference_and_critic_do_not(
    make: Make, folder: Path
) -> None:
    trainer = make(folder, advantage_estimator="ppo", kl_loss_coef=0.1, **REPLAY)
    work = batch()
    records = others(own_experts(trainer, work))
    asked = work.tokens, work.response_lengths
    policy, forced = trainer.log_probs(*asked), trainer.log_probs(*asked, "policy", records)
    reference = trainer.log_probs(*asked, "reference", records)
    assert policy == reference
    assert largest_gap(policy, forced) > 0.01
    values = trainer.values(*asked)
    ready = replace(work, experts=records, replayed=True, values=values, returns=values)
    old, ref = trainer.train_step.log_probs_before(ready, ["policy"])
    assert old is not None
    assert ref is not None
    # Packing shares the prompts' rows, which rounds otherwise.
    assert largest_gap([row.tolist() for row in old], forced) < 1e-5
    assert largest_gap([row.tolist() for row in ref], reference) < 1e-5
    assert trainer.update(ready, "one")[1]


def test_the_first_pass_of_an_update_is_replayed_in_its_later_steps(
    make: Make, folder: Path
) -> None:
    fast = PLAIN | {"learning_rate": 0.9, "adam_eps": 1e-3}
    first = make(folder, **fast, **TWO_STEPS, use_routing_replay=True)
    steps = first.update(batch(), "one")[0]
    assert [row["train/routing/overlap"] == 1.0 for row in steps] == [True, False]
    assert steps[0]["train/ppo_kl"] == 0.0
    free = make(folder, **fast, **TWO_STEPS)
    without = free.update(batch(), "one")[0]
    assert "train/routing/overlap" not in without[0]
    assert without[0]["train/loss"] == steps[0]["train/loss"]
    assert without[1]["train/loss"] != steps[1]["train/loss"]


def test_with_one_step_there_is_nothing_to_replay_of_the_own(make: Make, folder: Path) -> None:
    row = make(folder, **PLAIN, use_routing_replay=True).update(batch(), "one")[0][0]
    assert not [name for name in row if "routing" in name]


def test_a_model_without_experts_cannot_be_told_any(make: Make) -> None:
    trainer = make(use_routing_replay=True)
    with pytest.raises(StackError, match="no routers that can be told"):
        trainer.update(batch(), "one")
