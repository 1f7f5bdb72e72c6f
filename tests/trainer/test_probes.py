"""Experiments in the trainer by itself: what they compute, and that they leave no trace."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.messages import TrainBatch
from kit.models.sharding import whole
from kit.tiny import MODEL_DIR
from kit.trainer.actor import Trainer
from kit.trainer.probes import Samples, SamplingTransform
from kit.weight_sync.transport import POLICY
from tests.trainer.trainers import Make, backend, weights
from tests.trainer.trainers import make as start

__all__ = ["start"]  # a fixture

SAMPLES = Samples(
    [[5, 40, 41, 2, 6, 50, 51, 2], [5, 40, 41, 2, 6, 52, 2], [5, 44, 2, 6, 2]], [3, 2, 1]
)


@pytest.fixture
def make(start: Make, tmp_path: Path) -> Make:
    """Starts one trainer of a copy of the tiny model, with changes to its config.json."""

    def make(**changes: Any) -> Trainer:
        folder = tmp_path / "model"
        shutil.copytree(MODEL_DIR, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return start(folder, learning_rate=1e-3)

    return make


def batch() -> TrainBatch:
    return TrainBatch(
        tokens=SAMPLES.tokens,
        response_lengths=SAMPLES.response_lengths,
        loss_masks=[[1] * n for n in SAMPLES.response_lengths],
        advantages=[1.0, -1.0, 1.0],
        rollout_log_probs=None,
    )


def flat(rows: Any) -> torch.Tensor:
    return torch.tensor([x for row in rows for x in row])


def test_every_way_of_computing_the_same_gives_the_same(make: Make) -> None:
    trainer = make()
    expected = flat(trainer.log_probs(SAMPLES.tokens, SAMPLES.response_lengths))
    ways = {
        "packed": trainer.probes.recompute(SAMPLES, 0.8),
        "alone": trainer.probes.recompute(SAMPLES, 0.8, packed=False),
        "training mode": trainer.probes.recompute(SAMPLES, 0.8, training_mode=True),
        "sampled": trainer.probes.sampled(SAMPLES, [SamplingTransform(0.8)])[0],
        "float32": trainer.probes.plainly(SAMPLES, ["float32"], 0.8)[0],
        "float64": trainer.probes.plainly(SAMPLES, ["float64"], 0.8)[0],
    }
    for name, rows in ways.items():
        torch.testing.assert_close(flat(rows), expected, atol=1e-5, rtol=1e-5, msg=name)
    coarse = flat(trainer.probes.plainly(SAMPLES, ["bfloat16"], 0.8)[0])
    assert (coarse - expected).abs().max() > 1e-4


def test_weights_can_be_rounded_by_themselves(make: Make) -> None:
    def plainly(dtype: str, rounded_to: str | None = None) -> torch.Tensor:
        return flat(trainer.probes.plainly(SAMPLES, [dtype], 0.8, rounded_to=rounded_to)[0])

    trainer = make()
    assert torch.equal(plainly("bfloat16", "bfloat16"), plainly("bfloat16"))
    assert torch.equal(plainly("float32", "float32"), plainly("float32"))
    moved = plainly("float32", "bfloat16") - plainly("float32")
    assert 1e-5 < moved.abs().max() < 0.1


def test_cuts_are_those_of_a_sampler(make: Make) -> None:
    trainer = make()
    raw, best, half = trainer.probes.sampled(
        SAMPLES,
        [
            SamplingTransform(1.0),
            SamplingTransform(1.0, top_k=1),
            SamplingTransform(1.0, top_p=0.5),
        ],
    )
    # What is left of the likeliest token alone has probability 1, any other has none.
    assert set(flat(best).tolist()) <= {0.0, -torch.inf}
    kept = flat(half).isfinite()
    assert (flat(half)[kept] >= flat(raw)[kept] - 1e-6).all()


def dropping(trainer: Trainer) -> Trainer:
    """As a model does whose own code drops something, whatever its configuration says."""
    for module in trainer.backend.module().modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.3
    return trainer


def test_dropout_of_the_configuration_changes_no_update_whoever_looked_before(make: Make) -> None:
    """After a look the model was in training mode, and the next update with dropout."""
    expected, metrics = list[torch.Tensor](), list[Any]()
    for dropout, looks in ((0.0, False), (0.3, False), (0.3, True)):
        trainer = make(attention_dropout=dropout)
        assert trainer.probes.dropouts() == []
        if looks:
            trainer.log_probs(SAMPLES.tokens, SAMPLES.response_lengths)
        metrics.append(trainer.update(batch(), "first"))
        expected.append(weights(trainer))
    assert metrics[0] == metrics[1] == metrics[2]
    assert torch.equal(expected[0], expected[1])
    assert torch.equal(expected[1], expected[2])


def test_dropout_shows_in_training_mode_only_and_takes_no_randomness(make: Make) -> None:
    trainer = dropping(make())
    before = torch.random.get_rng_state()
    first, second = (flat(trainer.probes.recompute(SAMPLES, 0.8, seed=s)) for s in (1, 2))
    training = flat(trainer.probes.recompute(SAMPLES, 0.8, training_mode=True))
    assert torch.equal(first, second)
    assert (first - training).abs().mean() > 1e-2
    assert torch.equal(torch.random.get_rng_state(), before)


def test_dropout_breaks_the_first_step(make: Make) -> None:
    seen = dropping(make()).probes.startup(batch())
    assert abs(seen.ppo_kl) > 1e-6
    assert seen.changed_values == 0


def test_looking_at_a_first_update_leaves_no_trace(make: Make) -> None:
    trainer = make()
    trainer.update(batch(), "first")  # so that there are moments to lose
    settings, last = trainer.settings, trainer.state.last_update
    learner = backend(trainer).learners["policy"]

    def state() -> list[torch.Tensor]:
        moments = [x for s in learner.optimizer.state.values() for x in s.values()]
        values = [*learner.model.parameters(), *moments]
        return [whole(v).clone() for v in values] + [torch.random.get_rng_state()]

    before = state()
    seen = trainer.probes.startup(batch())
    after = state()
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert trainer.settings == settings
    assert (trainer.state.last_update, trainer.state.optimizer_steps) == (last, 1)
    assert seen.reference_gap is None
    assert seen.values == sum(p.numel() for p in learner.model.parameters())


def test_a_weight_that_learning_rate_zero_changes_is_counted_and_put_back(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    learner = backend(trainer).learners["policy"]
    norm = next(p for n, p in learner.model.named_parameters() if n.endswith("model.norm.weight"))
    before = whole(norm).clone()
    step = learner.optimizer.step

    def careless_step() -> None:
        step()
        with torch.no_grad():
            norm.mul_(1.0000001)

    monkeypatch.setattr(learner.optimizer, "step", careless_step)
    assert trainer.probes.startup(batch()).changed_values > 0
    assert torch.equal(whole(norm), before)


def test_checksums_fuse_what_sglang_fuses_and_know_both_dtypes(make: Make) -> None:
    found = make().weights.checksums(POLICY)
    assert len(found) == 4 * 8 + 2
    assert "model.layers.0.self_attn.qkv_proj.weight" in found
    assert "model.layers.0.mlp.gate_up_proj.weight" in found
    assert not [name for name in found if "q_proj" in name or "lm_head" in name]
    for sums in found.values():
        assert set(sums["float32"]).isdisjoint(sums["bfloat16"])
