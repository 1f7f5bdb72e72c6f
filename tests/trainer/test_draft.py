"""A draft in the trainer: it learns what the policy writes, and the policy knows nothing of it."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from kit.config import TrainingConfig
from kit.drafts import make_draft, shorten
from kit.errors import CheckpointError, ConfigError, ModelError
from kit.messages import TrainBatch
from kit.tiny import MODEL_DIR
from kit.trainer.actor import Trainer
from kit.weight_sync.transport import DRAFT, ReceiveBuffer
from tests.trainer.trainers import Make, batch, make, weights

__all__ = ["make"]  # a fixture
LEARNS = {"learning_rate": 1e-3, "draft": {"learning_rate": 3e-4}}
TAUGHT = {"learning_rate": 1e-3, "draft": {"learning_rate": 3e-4, "loss": "forward_kl"}}


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's first layer."""
    folder = tmp_path_factory.mktemp("draft")
    shorten(MODEL_DIR, folder, 1)
    return folder


def draft_weights(trainer: Trainer) -> torch.Tensor:
    handle = trainer.export_weights(model=DRAFT)
    assert handle is not None
    return ReceiveBuffer().receive(handle).view(torch.float32).clone()


def transformers_logits(folder: Path, given: TrainBatch) -> torch.Tensor:
    """Logits before each response token, by Transformers itself, (R, vocabulary)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = []
    with torch.no_grad():
        for tokens, length in zip(given.tokens, given.response_lengths, strict=True):
            rows.append(model(torch.tensor([tokens])).logits[0, -length - 1 : -1])
    return torch.cat(rows)


def test_a_draft_begins_with_layers_of_the_model(draft: Path, tmp_path: Path) -> None:
    own, short = load_file(MODEL_DIR / "model.safetensors"), load_file(draft / "model.safetensors")
    assert {n.split(".")[2] for n in short if ".layers." in n} == {"0"}
    assert all(torch.equal(own[name], value) for name, value in short.items())
    shorten(MODEL_DIR, tmp_path, 2)
    two = load_file(tmp_path / "model.safetensors")
    last = max(int(n.split(".")[2]) for n in own if ".layers." in n)
    weight = "self_attn.q_proj.weight"
    assert torch.equal(two[f"model.layers.1.{weight}"], own[f"model.layers.{last}.{weight}"])
    with pytest.raises(ConfigError, match="fewer than"):
        shorten(MODEL_DIR, tmp_path, last + 1)


@pytest.mark.parametrize("how", [LEARNS, TAUGHT], ids=["cross_entropy", "forward_kl"])
def test_the_draft_learns_and_the_policy_is_the_same_to_the_bit(
    make: Make, draft: Path, how: dict[str, Any]
) -> None:
    alone = make(learning_rate=1e-3)
    for step in range(6):
        alone.update(batch(0), f"{step}")
    expected = weights(alone).clone()
    trainer = make(draft_path=draft, **how)
    before = draft_weights(trainer)
    losses = []
    for step in range(6):
        (row,), _ = trainer.update(batch(0), f"{step}")
        losses.append(row["train/draft_loss"])
        assert row["train/draft_grad_norm"] > 0
    assert torch.equal(weights(trainer).view(torch.int32), expected.view(torch.int32))
    assert losses[-1] < losses[0]
    assert not torch.equal(draft_weights(trainer), before)


def test_its_loss_is_the_mean_over_all_response_tokens(make: Make, draft: Path) -> None:
    # With a large eps AdamW is nearly plain gradient descent: small differences stay small.
    trainer = make(draft_path=draft, adam_eps=1.0, **LEARNS)
    given = batch()
    rows = trainer.log_probs(given.tokens, given.response_lengths, DRAFT)
    mean = -sum(map(sum, rows)) / sum(given.response_lengths)
    small = make(draft_path=draft, max_tokens=16, adam_eps=1.0, **LEARNS)
    for each in (trainer, small):  # in one micro-batch, and in several
        (row,), _ = each.update(given, "first")
        assert row["train/draft_loss"] == pytest.approx(mean, rel=1e-5)
    torch.testing.assert_close(draft_weights(small), draft_weights(trainer), rtol=0, atol=2e-5)


def test_its_loss_can_be_the_distance_from_the_policys_distributions(
    make: Make, draft: Path
) -> None:
    given, temperature = batch(), 0.7
    own = transformers_logits(MODEL_DIR, given), transformers_logits(draft, given)
    logp, logq = (torch.log_softmax(logits / temperature, -1) for logits in own)
    expected = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="batchmean")
    # With a large eps AdamW is nearly plain gradient descent: small differences stay small.
    after = []
    for tokens in (128, 16):  # in one micro-batch, and in several
        trainer = make(draft_path=draft, max_tokens=tokens, adam_eps=1.0, **TAUGHT)
        trainer.configure(trainer.settings.training, temperature)
        (row,), _ = trainer.update(given, "first")
        assert row["train/draft_loss"] == pytest.approx(float(expected), rel=1e-4)
        after.append(draft_weights(trainer))
    torch.testing.assert_close(*after, rtol=0, atol=2e-5)


def test_in_each_step_of_an_update_it_learns_from_the_policy_as_it_is_by_then(
    make: Make, draft: Path
) -> None:
    # The draft stays, and the policy goes: so does the distance.
    how = {"learning_rate": 3e-3, "draft": {"learning_rate": 0.0, "loss": "forward_kl"}}
    (alone,), _ = make(draft_path=draft, **how).update(batch(), "first")
    rows, _ = make(draft_path=draft, epochs_per_rollout=3, **how).update(batch(), "first")
    losses = [row["train/draft_loss"] for row in rows]
    assert losses[0] == pytest.approx(alone["train/draft_loss"], rel=1e-6)
    assert all(abs(a - b) > 1e-3 for a, b in pairwise(losses))


def test_it_is_kept_undone_saved_and_loaded_with_the_rest(
    make: Make, draft: Path, tmp_path: Path
) -> None:
    trainer = make(draft_path=draft, **LEARNS)
    trainer.update(batch(0), "a")
    trainer.snapshot("here")
    trainer.save(str(tmp_path / "state"))
    trainer.update(batch(1), "b")
    after = draft_weights(trainer)
    trainer.restore("here")
    assert not torch.equal(draft_weights(trainer), after)
    trainer.update(batch(1), "c")
    assert torch.equal(draft_weights(trainer), after)
    other = make(draft_path=draft, **LEARNS)
    other.load(str(tmp_path / "state"))
    other.update(batch(1), "d")
    assert torch.equal(draft_weights(other), after)


def test_no_learning_rate_leaves_it_as_it_is(make: Make, draft: Path) -> None:
    trainer = make(draft_path=draft, **LEARNS)
    before = draft_weights(trainer)
    still = TrainingConfig(learning_rate=1e-3, draft={"learning_rate": 0.0})  # type: ignore[arg-type]
    trainer.configure(still, 0.8)
    trainer.update(batch(0), "a")
    assert torch.equal(draft_weights(trainer), before)


def test_a_model_whose_layers_cannot_be_taken_apart_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from tests.small_models import with_tiny_tokenizer

    model = tmp_path / "gpt2"
    GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=112)).save_pretrained(
        model
    )
    with_tiny_tokenizer(model)
    with pytest.raises(ModelError, match="cannot be made of"):
        shorten(model, tmp_path / "draft", 1)


def test_a_place_that_is_taken_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(CheckpointError, match="is there already and is no export"):
        make_draft("tiny", tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "kept"
