"""A head in the trainer: it learns from the policy's states, which know nothing of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kit.config import HeadKind, TrainingConfig
from kit.models.source import copied_by
from kit.tiny import MODEL_DIR
from kit.trainer.actor import Trainer
from kit.weight_sync.transport import DRAFT, ReceiveBuffer
from tests.heads import MTP, Drafter, Written, WrittenEagle3, random_eagle3, random_head, with_layer
from tests.small_models import make_model
from tests.trainer.trainers import Make, batch, make, weights

__all__ = ["make"]  # a fixture
LEARNS = {"learning_rate": 1e-3, "draft": {"learning_rate": 3e-4}}


@dataclass(frozen=True)
class Case:
    """A model and a head for it."""

    kind: HeadKind
    model: Path
    head: Path
    family: str = "MiMo"

    @property
    def written(self) -> Drafter:
        """Both by the formulas."""
        if self.kind == "mtp":
            return MTP[self.family](self.model)
        return (Written if self.kind == "eagle" else WrittenEagle3)(self.head)


@pytest.fixture(scope="module")
def eagles(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("eagle", MODEL_DIR, random_head(tmp_path_factory.mktemp("head")))


@pytest.fixture(scope="module")
def eagles3(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Its head has some words only, and misses some that are written."""
    words = [*range(3, 40, 2), *range(40, 90)]
    return Case("eagle3", MODEL_DIR, random_eagle3(tmp_path_factory.mktemp("head"), words=words))


@pytest.fixture(scope="module")
def mimos(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = make_model(tmp_path_factory.mktemp("mimo"), "MiMo")
    return Case("mtp", folder, folder)


@pytest.fixture(scope="module")
def glms(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = with_layer(tmp_path_factory.mktemp("glm"), "Glm4Moe")
    return Case("mtp", folder, folder, "Glm4Moe")


@pytest.fixture(params=["eagles", "eagles3", "mimos", "glms"])
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.getfixturevalue(request.param)
    return found


def with_head(make: Make, case: Case, **settings: object) -> Trainer:
    own = {"draft_path": case.head, "draft_head": case.kind}
    return make(case.model, **own, **{**LEARNS, **settings})


def head_weights(trainer: Trainer) -> torch.Tensor:
    handle = trainer.export_weights(model=DRAFT)
    assert handle is not None
    return ReceiveBuffer().receive(handle).view(torch.float32).clone()


def test_the_head_learns_and_the_policy_is_the_same_to_the_bit(make: Make, case: Case) -> None:
    alone = make(case.model, learning_rate=1e-3)
    for step in range(6):
        alone.update(batch(0), f"{step}")
    expected = weights(alone).clone()
    trainer = with_head(make, case)
    before = head_weights(trainer)
    losses = []
    for step in range(6):
        (row,), _ = trainer.update(batch(0), f"{step}")
        losses.append(row["train/draft_loss"])
        assert row["train/draft_grad_norm"] > 0
    assert torch.equal(weights(trainer).view(torch.int32), expected.view(torch.int32))
    assert losses[-1] < losses[0]
    assert not torch.equal(head_weights(trainer), before)


def test_its_loss_is_the_mean_over_what_a_head_drafts(make: Make, case: Case) -> None:
    """By the formulas, sample by sample, on the states of the policy before the update."""
    given, written = batch(), case.written
    rows = [
        written.log_probs(tokens, n, 0.8)
        for tokens, n in zip(given.tokens, given.response_lengths, strict=True)
    ]
    mean = -float(torch.cat(rows).mean())
    found = []
    for settings in ({}, {"max_tokens": 16}):  # in one micro-batch, and in several
        # With a large eps AdamW is nearly plain gradient descent: small differences stay small.
        trainer = with_head(make, case, adam_eps=1.0, **settings)
        (row,), _ = trainer.update(given, "first")
        assert row["train/draft_loss"] == pytest.approx(mean, rel=1e-5)
        found.append(head_weights(trainer))
    torch.testing.assert_close(*found, rtol=0, atol=2e-5)


def test_it_can_learn_from_the_policys_distributions(make: Make, case: Case) -> None:
    given, written = batch(), case.written
    rows = [
        written.divergence(tokens, n, 0.8)
        for tokens, n in zip(given.tokens, given.response_lengths, strict=True)
    ]
    alone = make(case.model, learning_rate=1e-3)
    alone.update(given, "first")
    expected = weights(alone).clone()
    trainer = with_head(make, case, draft={"learning_rate": 3e-4, "loss": "forward_kl"})
    (row,), _ = trainer.update(given, "first")
    assert row["train/draft_loss"] == pytest.approx(float(torch.cat(rows).mean()), rel=1e-5)
    assert torch.equal(weights(trainer).view(torch.int32), expected.view(torch.int32))


def test_it_is_kept_undone_saved_and_loaded_with_the_rest(
    make: Make, case: Case, tmp_path: Path
) -> None:
    trainer = with_head(make, case)
    trainer.update(batch(0), "a")
    trainer.snapshot("here")
    trainer.save(str(tmp_path / "state"))
    trainer.update(batch(1), "b")
    after = head_weights(trainer)
    trainer.restore("here")
    assert not torch.equal(head_weights(trainer), after)
    trainer.update(batch(1), "c")
    assert torch.equal(head_weights(trainer), after)
    other = with_head(make, case)
    other.load(str(tmp_path / "state"))
    other.update(batch(1), "d")
    assert torch.equal(head_weights(other), after)
    other.begin_anew()
    assert torch.equal(head_weights(other), head_weights(with_head(make, case)))


def test_no_learning_rate_leaves_it_as_it_is(make: Make, case: Case) -> None:
    trainer = with_head(make, case)
    before = head_weights(trainer)
    still = TrainingConfig(learning_rate=1e-3, draft={"learning_rate": 0.0})  # type: ignore[arg-type]
    trainer.configure(still, 0.8)
    trainer.update(batch(0), "a")
    assert torch.equal(head_weights(trainer), before)


def test_an_eagle_head_is_written_as_it_is_read(make: Make, eagles: Case, tmp_path: Path) -> None:
    trainer = with_head(make, eagles)
    trainer.export_hf(str(tmp_path), "float32", of=DRAFT)
    before = load_file(eagles.head / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not before.keys() & load_file(MODEL_DIR / "model.safetensors").keys()


def test_an_eagle3_head_is_written_with_its_words(
    make: Make, eagles3: Case, tmp_path: Path
) -> None:
    with_head(make, eagles3).export_hf(str(tmp_path), "float32", of=DRAFT)
    before = load_file(eagles3.head / "model.safetensors")
    after = load_file(tmp_path / "model.safetensors")
    named = {name.replace("midlayer.", "layers.0."): value for name, value in before.items()}
    assert named.keys() == after.keys()
    assert all(torch.equal(named[name], after[name]) for name in named)
    assert after["d2t"].dtype is torch.int64


@pytest.mark.parametrize("family", MTP)
@pytest.mark.parametrize("trains", [False, True])
def test_a_models_own_layer_goes_with_it_wherever_it_goes(
    make: Make, tmp_path: Path, trains: bool, family: str
) -> None:
    """As it was trained, or as its files have it, in whatever dtype."""
    model = with_layer(tmp_path / "model", family, torch.bfloat16)
    case = Case("mtp", model, model)
    trainer = with_head(make, case) if trains else make(model, learning_rate=1e-3)
    trainer.update(batch(0), "a")
    for dtype in ("float32", "bfloat16"):
        folder = tmp_path / dtype
        folder.mkdir()
        trainer.export_hf(str(folder), dtype)
        before = load_file(model / "model.safetensors")
        after = load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        own = MTP[family](model).prefix
        read = "eh_proj" if family.startswith("Glm") else "input_proj"
        if trains and dtype == "float32":  # in bfloat16 an update may be lost in rounding
            assert not torch.equal(
                before[f"{own}.{read}.weight"].float(), after[f"{own}.{read}.weight"]
            )
        for name in before:
            if name.startswith(own) and (of := copied_by(name)):
                assert torch.equal(after[name], after[of])
            elif name.startswith(own) and not trains:
                assert torch.equal(after[name], before[name])


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("Qwen3", ["mtp.fc.weight", "mtp.layers.0.mlp.up_proj.weight"]),
        ("Ernie4_5", ["model.mtp_block.0.mlp.up_proj.weight", "model.mtp_emb_norm.0.weight"]),
        ("Glm4Moe", ["model.layers.2.eh_proj.weight", "model.layers.2.mlp.gate.weight"]),
    ],
)
def test_no_export_loses_layers_that_predict_further_tokens(
    make: Make, tmp_path: Path, family: str, names: list[str]
) -> None:
    """Copies of embedding and output among them are of those that were trained."""
    model = make_model(tmp_path / "model", family)
    before = load_file(model / "model.safetensors")
    own = {name: torch.randn(4) for name in names}
    copies = {
        "model.layers.2.embed_tokens.weight": "model.embed_tokens.weight",
        "model.layers.2.shared_head.head.weight": "lm_head.weight",
    }
    copies = {} if family != "Glm4Moe" else copies
    own |= {name: before[of].clone() for name, of in copies.items()}
    save_file(before | own, model / "model.safetensors", {"format": "pt"})
    trainer = make(model, learning_rate=1e-2)
    trainer.update(batch(0), "a")
    (tmp_path / "out").mkdir()
    trainer.export_hf(str(tmp_path / "out"), "float32")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == (before | own).keys()
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])
    for name in own:
        assert torch.equal(after[name], after[copies[name]] if name in copies else own[name])


def test_a_factor_on_the_loss_is_one_on_the_gradient_alone(make: Make, mimos: Case) -> None:
    found = []
    for factor in (0.1, 0.4):
        draft = {"learning_rate": 3e-4, "mtp_loss_scaling_factor": factor}
        (row,), _ = with_head(make, mimos, draft=draft).update(batch(0), "a")
        found.append((row["train/draft_loss"], row["train/draft_grad_norm"]))
    assert found[0][0] == found[1][0]
    assert 4 * found[0][1] == pytest.approx(found[1][1], rel=1e-5)
