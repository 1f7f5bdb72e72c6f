"""Moments in 8 bits on a GPU: torchao's compiled step is what it computes uncompiled on a CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

from kit import RLSession, SessionConfig
from kit.models.sharding import local
from kit.trainer.learner import kept_tensors, make_optimizer, take_step
from tests.config.test_quantization import WHOLE_BLOCKS
from tests.faults.interrupts import digests
from tests.small_models import make_model
from tests.trainer.test_estimators import WITH_CRITIC, valued
from tests.trainer.test_learner import EIGHT, digests_after_an_undo
from tests.trainer.trainers import Make, backend, batch, make

__all__ = ["make"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ADAM = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_model(tmp_path / "model", "Qwen3", **WHOLE_BLOCKS)


def test_a_compiled_step_is_the_step() -> None:
    """Of weights in blocks and of small ones; a code may fall to the next where bits differ."""
    torch.manual_seed(0)
    starts = [torch.randn(*shape) for shape in ((384, 256), (104, 256), (256,), (8192,))]
    sides = {}
    for device in ("cpu", "cuda"):
        parameters = [torch.nn.Parameter(value.to(device, copy=True)) for value in starts]
        sides[device] = parameters, make_optimizer("adamw8bit", parameters, 0.1, ADAM)
    for number in range(5):
        draw = torch.Generator().manual_seed(number)
        gradients = [torch.randn(value.shape, generator=draw) for value in starts]
        for device, (parameters, optimizer) in sides.items():
            for value, gradient in zip(parameters, gradients, strict=True):
                value.grad = gradient.to(device)
            take_step(optimizer, 0.1 / (1 + number))
    (ours, one), (theirs, other) = sides["cuda"], sides["cpu"]
    for start, a, b in zip(starts, ours, theirs, strict=True):
        assert (b - start).abs().mean() > 0.01
        assert (a.cpu() - b).abs().mean() < 1e-4
        kept, wanted = dict(kept_tensors(one.state[a])), dict(kept_tensors(other.state[b]))
        assert kept.keys() == wanted.keys()
        for name, value in kept.items():
            if name.endswith("codes"):
                assert (value.cpu() != wanted[name]).float().mean() < 0.01, name
            else:
                torch.testing.assert_close(value.cpu(), wanted[name], rtol=1e-3, atol=1e-6)


def test_steps_are_nearly_those_of_adamw_and_take_no_more_memory(make: Make, model: Path) -> None:
    ends, held = [], []
    for kind in ("adamw", "adamw8bit"):
        trainer = make(model, device="cuda", dtype="bfloat16", optimizer=kind, learning_rate=1e-3)
        start = [local(value).clone() for _, value in backend(trainer).named_trained()]
        for step in range(4):
            trainer.update(batch(step), f"step {step}")
        named = [value for _, value in backend(trainer).named_trained()]
        assert all(isinstance(value, DTensor) and value.is_cuda for value in named)
        end = [local(value) for value in named]
        ends.append(torch.cat([(a - b).flatten() for a, b in zip(end, start, strict=True)]))
        held.append(trainer.state.size())
    plain, eight = ends
    assert torch.nn.functional.cosine_similarity(plain, eight, dim=0) > 0.6
    assert 0.5 < eight.norm() / plain.norm() < 2
    assert not torch.equal(plain, eight)
    assert held[1] < 0.55 * held[0]


def test_a_snapshot_and_a_checkpoint_bring_back_every_bit(
    make: Make, model: Path, tmp_path: Path
) -> None:
    how = WITH_CRITIC | EIGHT | {"device": "cuda", "dtype": "bfloat16"}
    trainer = make(model, **how)
    trainer.update(valued(trainer, batch()), "one")
    trainer.snapshot("here")
    trainer.save(str(tmp_path / "saved"))
    there = trainer.probe("digest")
    asked = valued(trainer, batch(1))
    first = trainer.update(asked, "two")[0]
    after = trainer.probe("digest")
    assert after != there
    trainer.restore("here")
    assert trainer.probe("digest") == there
    assert trainer.update(asked, "two again")[0] == first
    assert trainer.probe("digest") == after
    other = make(model, **how)
    other.load(str(tmp_path / "saved"))
    assert other.probe("digest") == there
    assert other.update(asked, "two")[0] == first
    assert other.probe("digest") == after


def test_a_session_learns_and_takes_back_an_update(alone: None, tmp_path: Path) -> None:
    config = SessionConfig.preset("tiny").replace("training.optimizer", "adamw8bit")
    config = config.replace("memory.device_gib", 8.0)
    with RLSession.start(config) as session:
        before = digests_after_an_undo(session)
        path = session.save(tmp_path / "saved")
        session.train(27, show=False)
        assert session.evaluate().mean_reward >= 0.9
    with RLSession.load(path) as session:
        assert digests(session) == before
        session.step()
        assert digests(session) != before
