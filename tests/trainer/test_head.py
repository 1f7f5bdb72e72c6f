"""An EAGLE head in the trainer: it learns from the policy's states, which know nothing of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kit.config import TrainingConfig
from kit.tiny import MODEL_DIR
from kit.trainer.actor import Trainer
from kit.weight_sync.transport import DRAFT, ReceiveBuffer
from tests.heads import Written, random_head
from tests.trainer.trainers import Make, batch, make, weights

__all__ = ["make"]  # a fixture
LEARNS = {"learning_rate": 1e-3, "draft": {"learning_rate": 3e-4}}


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_head(tmp_path_factory.mktemp("head"))


def with_head(make: Make, head: Path, **settings: object) -> Trainer:
    return make(draft_path=head, draft_is_head=True, **{**LEARNS, **settings})


def head_weights(trainer: Trainer) -> torch.Tensor:
    handle = trainer.export_weights(model=DRAFT)
    assert handle is not None
    return ReceiveBuffer().receive(handle).view(torch.float32).clone()


def test_the_head_learns_and_the_policy_is_the_same_to_the_bit(make: Make, head: Path) -> None:
    alone = make(learning_rate=1e-3)
    for step in range(6):
        alone.update(batch(0), f"{step}")
    expected = weights(alone).clone()
    trainer = with_head(make, head)
    before = head_weights(trainer)
    losses = []
    for step in range(6):
        (row,), _ = trainer.update(batch(0), f"{step}")
        losses.append(row["train/draft_loss"])
        assert row["train/draft_grad_norm"] > 0
    assert torch.equal(weights(trainer).view(torch.int32), expected.view(torch.int32))
    assert losses[-1] < losses[0]
    assert not torch.equal(head_weights(trainer), before)


def test_its_loss_is_the_mean_over_what_a_head_drafts(make: Make, head: Path) -> None:
    """By the formulas, sample by sample, on the states of the policy before the update."""
    given, written = batch(), Written(head)
    rows = [
        written.log_probs(tokens, n, 0.8)
        for tokens, n in zip(given.tokens, given.response_lengths, strict=True)
    ]
    mean = -float(torch.cat(rows).mean())
    found = []
    for settings in ({}, {"max_tokens": 16}):  # in one micro-batch, and in several
        # With a large eps AdamW is nearly plain gradient descent: small differences stay small.
        trainer = with_head(make, head, adam_eps=1.0, **settings)
        (row,), _ = trainer.update(given, "first")
        assert row["train/draft_loss"] == pytest.approx(mean, rel=1e-5)
        found.append(head_weights(trainer))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_it_can_learn_from_the_policys_distributions(make: Make, head: Path) -> None:
    given, written = batch(), Written(head)
    rows = [
        written.divergence(tokens, n, 0.8)
        for tokens, n in zip(given.tokens, given.response_lengths, strict=True)
    ]
    alone = make(learning_rate=1e-3)
    alone.update(given, "first")
    expected = weights(alone).clone()
    trainer = with_head(make, head, draft={"learning_rate": 3e-4, "loss": "forward_kl"})
    (row,), _ = trainer.update(given, "first")
    assert row["train/draft_loss"] == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert torch.equal(weights(trainer).view(torch.int32), expected.view(torch.int32))


def test_it_is_kept_undone_saved_and_loaded_with_the_rest(
    make: Make, head: Path, tmp_path: Path
) -> None:
    trainer = with_head(make, head)
    trainer.update(batch(0), "a")
    trainer.snapshot("here")
    trainer.save(str(tmp_path / "state"))
    trainer.update(batch(1), "b")
    after = head_weights(trainer)
    trainer.restore("here")
    assert not torch.equal(head_weights(trainer), after)
    trainer.update(batch(1), "c")
    assert torch.equal(head_weights(trainer), after)
    other = with_head(make, head)
    other.load(str(tmp_path / "state"))
    other.update(batch(1), "d")
    assert torch.equal(head_weights(other), after)
    other.begin_anew()
    assert torch.equal(head_weights(other), head_weights(with_head(make, head)))


def test_no_learning_rate_leaves_it_as_it_is(make: Make, head: Path) -> None:
    trainer = with_head(make, head)
    before = head_weights(trainer)
    still = TrainingConfig(learning_rate=1e-3, draft={"learning_rate": 0.0})  # type: ignore[arg-type]
    trainer.configure(still, 0.8)
    trainer.update(batch(0), "a")
    assert torch.equal(head_weights(trainer), before)


def test_it_is_written_as_it_is_read(make: Make, head: Path, tmp_path: Path) -> None:
    trainer = with_head(make, head)
    trainer.export_hf(str(tmp_path), "float32", of=DRAFT)
    before = load_file(head / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not before.keys() & load_file(MODEL_DIR / "model.safetensors").keys()
