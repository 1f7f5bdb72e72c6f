"""What a trainer keeps, in memory and on disk: bit by bit what it was, or an error."""

import json
import os
import pickle
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.errors import CheckpointError, SessionError
from kit.models.sharding import local_bytes
from kit.trainer.actor import Trainer
from tests.trainer.test_estimators import WITH_CRITIC, valued
from tests.trainer.trainers import Make, batch, make, weights

__all__ = ["make"]  # a fixture
EVERYTHING = WITH_CRITIC | {"kl_coef": 0.1, "ref_update_interval": 2, "learning_rate": 1e-3}


def everything(trainer: Trainer) -> dict[str, bytes]:
    """Every bit of weights, optimizers, critic and reference."""
    tensors = trainer.backend.state_tensors()
    return {name: local_bytes(tensor).numpy().tobytes() for name, tensor in tensors.items()}


def test_a_trainer_is_what_it_was_at_its_snapshot_bit_by_bit(make: Make) -> None:
    trainer = make(**EVERYTHING)
    randomness = torch.get_rng_state()
    assert trainer.snapshot("start") == trainer.state_bytes()
    fresh = everything(trainer)
    for name in "abc":
        trainer.update(valued(trainer, batch()), name)
    given = valued(trainer, batch(1))
    trainer.snapshot("three")
    three = everything(trainer)
    metrics, _ = trainer.update(given, "d")
    four = everything(trainer)
    assert four.keys() == three.keys() > fresh.keys()
    assert four != three

    torch.rand(3)
    trainer.restore("start")
    assert everything(trainer) == fresh  # without an optimizer's state, as before any step
    assert torch.equal(torch.get_rng_state(), randomness)
    trainer.restore("three")
    assert everything(trainer) == three
    assert not trainer.update(given, "c")[1]  # it was the last one, then
    assert trainer.update(given, "d") == (metrics, True)
    assert everything(trainer) == four


def test_a_forgotten_snapshot_is_refused_and_changes_no_bit(make: Make) -> None:
    trainer = make(learning_rate=1e-3)
    trainer.snapshot("a")
    trainer.update(batch(), "x")
    before = everything(trainer)
    trainer.forget("a")
    trainer.forget("a")
    with pytest.raises(SessionError, match="does not hold the snapshot 'a'"):
        trainer.restore("a")
    assert everything(trainer) == before


def test_other_settings_are_those_of_a_trainer_that_was_started_with_them(make: Make) -> None:
    other = {"learning_rate": 1e-2, "adam_beta1": 0.5, "weight_decay": 0.1, "eps_clip": 0.01}
    fresh = make(**other, global_batch_size=4)
    fresh.update(batch(), "a")
    expected = everything(fresh)
    trainer = make(learning_rate=1e-3)
    trainer.configure(fresh.settings.training, fresh.settings.temperature)
    trainer.update(batch(), "a")
    assert everything(trainer) == expected


def test_a_loaded_trainer_goes_on_exactly_where_the_saved_one_would(
    make: Make, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "learning_rate": 1e-3,
        "lr_schedule": "cosine",
        "warmup_steps": 3,
        "kl_loss_coef": 0.1,
    }
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    trainer = make(**settings)
    trainer.update(batch(0), "a")
    trainer.save(str(folder))
    saved = weights(trainer)
    metrics, _ = trainer.update(batch(1), "b")
    after = weights(trainer)

    other = make(**settings)
    other.update(batch(5), "x")
    other.load(str(folder))
    assert torch.equal(weights(other), saved)
    assert other.state.optimizer_steps == 1
    assert other.update(batch(1), "b") == (metrics, True)
    assert torch.equal(weights(other), after)


def test_loading_an_update_id_again_does_not_pass_for_applied(make: Make, tmp_path: Path) -> None:
    trainer = make(learning_rate=1e-3)
    trainer.save(str(tmp_path))
    before = weights(trainer)
    trainer.update(batch(), "a")
    after = weights(trainer)
    trainer.load(str(tmp_path))
    assert torch.equal(weights(trainer), before)
    assert trainer.update(batch(), "a")[1]
    assert torch.equal(weights(trainer), after)


def test_everything_that_moves_is_in_a_checkpoint(make: Make, tmp_path: Path) -> None:
    trainer = make(**EVERYTHING)
    for name in "abc":
        trainer.update(valued(trainer, batch()), name)
    trainer.save(str(tmp_path))
    saved, drawn = everything(trainer), torch.get_rng_state()
    other = make(**EVERYTHING)
    torch.rand(5)
    other.load(str(tmp_path))
    assert everything(other) == saved
    assert (other.state.updates, other.state.optimizer_steps) == (3, 3)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_checkpoint_of_the_first_moment_has_no_optimizer_and_gives_none(
    make: Make, tmp_path: Path
) -> None:
    trainer = make(learning_rate=1e-3)
    trainer.save(str(tmp_path))
    fresh = everything(trainer)
    trainer.update(batch(), "a")
    trainer.load(str(tmp_path))
    assert everything(trainer) == fresh


@pytest.mark.parametrize("broken", ["*.safetensors", "trainer.json"])
def test_a_broken_checkpoint_is_refused_and_changes_no_bit(
    make: Make, tmp_path: Path, broken: str
) -> None:
    trainer = make(learning_rate=1e-3)
    trainer.update(batch(1), "a")
    trainer.save(str(tmp_path))
    trainer.update(batch(), "b")
    before = everything(trainer)
    os.truncate(next(tmp_path.glob(broken)), 5)
    with pytest.raises(CheckpointError, match="cannot be read"):
        trainer.load(str(tmp_path))
    assert everything(trainer) == before
    assert not trainer.update(batch(), "b")[1]


def test_a_checkpoint_of_another_model_is_refused_by_the_tensor(make: Make, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    trainer = make()
    trainer.save(str(tmp_path))
    (file,) = tmp_path.glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        head = opened.metadata()
    name = "policy/model.model.norm.weight"
    save_file(tensors | {name: torch.ones(7)}, file, head)
    before = everything(trainer)
    with pytest.raises(CheckpointError, match=r"model\.model\.norm\.weight has shape \(7,\)"):
        trainer.load(str(tmp_path))
    assert everything(trainer) == before


class RunsCode:
    """What a pickle can do to whoever reads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("place", [".metadata", "weights.safetensors", "trainer.json", "a.distcp"])
def test_a_hostile_file_runs_no_code(make: Make, tmp_path: Path, place: str) -> None:
    folder, mark = tmp_path / "checkpoint", tmp_path / "mark"
    folder.mkdir()
    trainer = make()
    trainer.save(str(folder))
    (folder / place).write_bytes(pickle.dumps(RunsCode(mark)))
    before = weights(trainer).clone()
    with suppress(CheckpointError):  # some of them are never looked at
        trainer.load(str(folder))
    assert not mark.exists()
    assert torch.equal(weights(trainer), before)
    pickle.loads((folder / place).read_bytes())
    assert mark.exists()  # the file would have


def test_counters_that_are_no_numbers_are_refused(make: Make, tmp_path: Path) -> None:
    trainer = make()
    trainer.save(str(tmp_path))
    for wrong in ({}, {"updates": "many", "optimizer_steps": 1}, [1], None):
        (tmp_path / "trainer.json").write_text(json.dumps(wrong))
        with pytest.raises(CheckpointError, match="cannot be read"):
            trainer.load(str(tmp_path))
