"""Moments in 8 bits: what they are, what a step does, and that nothing of them is lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kit import RLSession, SessionConfig
from kit.errors import CheckpointError, ConfigError
from kit.models.sharding import local
from kit.trainer.learner import step_compiled, take_step
from tests.faults.interrupts import digests
from tests.steps import responses_and_metrics
from tests.trainer.test_estimators import WITH_CRITIC, valued
from tests.trainer.trainers import Make, backend, batch, make

__all__ = ["make"]
EIGHT = {"optimizer": "adamw8bit", "learning_rate": 1e-3}


def test_moments_take_a_byte_a_number_and_weights_stay_in_float32(make: Make) -> None:
    trainer = make(**EIGHT)
    trainer.update(batch(), "one")
    tensors = backend(trainer).state_tensors()
    name = "model.model.layers.0.mlp.up_proj.weight"
    weight = tensors[f"policy/{name}"]
    place = f"policy.optimizer/{name}//exp_avg"
    assert weight.dtype is torch.float32
    assert tensors[f"{place}.codes"].dtype is torch.uint8
    assert tensors[f"{place}.codes"].shape == weight.shape
    assert tensors[f"{place}.scale"].shape == (weight.numel() // 256,)
    norm = "policy.optimizer/model.model.norm.weight//exp_avg"  # too small for blocks
    assert tensors[norm].dtype is torch.float32
    assert trainer.state.size() < 0.55 * _size_of_plain(make)


def _size_of_plain(make: Make) -> int:
    trainer = make(learning_rate=1e-3)
    trainer.update(batch(), "one")
    return trainer.state.size()


def test_steps_are_nearly_those_of_adamw(make: Make) -> None:
    ends = []
    for kind in ("adamw", "adamw8bit"):
        trainer = make(optimizer=kind, learning_rate=1e-3)
        start = [local(value).clone() for _, value in backend(trainer).named_trained()]
        for step in range(4):
            trainer.update(batch(step), f"step {step}")
        end = [local(value) for _, value in backend(trainer).named_trained()]
        ends.append(torch.cat([(a - b).flatten() for a, b in zip(end, start, strict=True)]))
    plain, eight = ends
    assert torch.nn.functional.cosine_similarity(plain, eight, dim=0) > 0.6
    assert 0.5 < eight.norm() / plain.norm() < 2
    assert not torch.equal(plain, eight)


def test_the_rate_of_a_step_is_the_one_that_was_asked_for(make: Make) -> None:
    trainer = make(**EIGHT)
    learner = backend(trainer).learners["policy"]
    trainer.update(batch(), "one")
    before = [local(value).clone() for value in learner.trained()]
    for value in learner.trained():
        value.grad = torch.ones_like(value)
    take_step(learner.optimizer, 0.0)
    assert all(torch.equal(local(a), b) for a, b in zip(learner.trained(), before, strict=True))
    take_step(learner.optimizer, 0.1)
    assert not any(torch.equal(local(a), b) for a, b in zip(learner.trained(), before, strict=True))


def test_the_step_that_a_gpu_compiles_is_torchaos_to_the_bit(make: Make) -> None:
    ends = []
    for compiles in (False, True):
        trainer = make(**EIGHT)
        optimizer = backend(trainer).learners["policy"].optimizer
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        draw = torch.Generator().manual_seed(0)
        for rate in (1e-3, 3e-3, 1e-2):
            for value in parameters:
                value.grad = torch.zeros_like(value)
                local(value.grad).copy_(torch.randn(value.shape, generator=draw))
            parameters[0].grad = None  # such as a weight that a loss did not reach
            if compiles:
                optimizer.param_groups[0]["lr"].fill_(rate)
                with torch.compiler.set_stance("force_eager"):  # on a CPU it takes minutes
                    step_compiled(optimizer)
            else:
                take_step(optimizer, rate)
        ends.append(trainer.probe("digest"))
        assert len(optimizer.state) == len(parameters) - 1
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_what_is_compiled_stays_compiled_after_a_step(make: Make, kind: str) -> None:
    """Layers are compiled on a GPU; once a step had them all computed uncompiled from then on."""
    compiled: list[object] = []

    def backend_of_ours(graph: torch.fx.GraphModule, _: object) -> object:
        compiled.append(graph)
        return graph.forward

    trainer = make(optimizer=kind, learning_rate=1e-3)
    trainer.update(batch(), "one")
    torch.compiler.reset()
    torch.compile(lambda x: x + 1, backend=backend_of_ours)(torch.ones(2))
    assert len(compiled) == 1


def test_a_snapshot_and_a_checkpoint_bring_back_every_bit(make: Make, tmp_path: Path) -> None:
    trainer = make(**WITH_CRITIC | EIGHT)
    trainer.update(valued(trainer, batch()), "one")
    trainer.snapshot("here")
    trainer.save(str(tmp_path))
    there = trainer.probe("digest")
    asked = valued(trainer, batch(1))
    first = trainer.update(asked, "two")[0]
    after = trainer.probe("digest")
    trainer.restore("here")
    assert trainer.probe("digest") == there
    assert trainer.update(asked, "two again")[0] == first
    assert trainer.probe("digest") == after
    other = make(**WITH_CRITIC | EIGHT)
    other.load(str(tmp_path))
    assert other.probe("digest") == there
    assert other.update(asked, "two")[0] == first
    assert other.probe("digest") == after


def test_a_checkpoint_of_another_optimizer_is_refused(make: Make, tmp_path: Path) -> None:
    trainer = make(**EIGHT)
    trainer.update(batch(), "one")
    trainer.save(str(tmp_path))
    other = make(learning_rate=1e-3)
    before = other.probe("digest")
    with pytest.raises(CheckpointError, match="is not there"):
        other.load(str(tmp_path))
    assert other.probe("digest") == before


def test_what_was_never_tried_is_refused() -> None:
    for training, words in (
        ({"num_trainers": 2}, "num_trainers 2"),
        ({"optimizer_cpu_offload": True}, "optimizer_cpu_offload"),
        ({"draft": {}}, "training.draft"),
    ):
        with pytest.raises(ConfigError, match=words):
            SessionConfig(training={"optimizer": "adamw8bit", **training})
    with pytest.raises(ConfigError, match=r"model\.lora"):
        SessionConfig(training={"optimizer": "adamw8bit"}, model={"lora": {"r": 4}})


def digests_after_an_undo(session: RLSession) -> list[str]:
    """Those after two steps, to which a `what_if` and an update that is undone come back."""
    session.train(2, show=False)
    rollout = session.score(session.generate())
    before = digests(session)
    asked = session.advantages(rollout)
    session.what_if(lr=[1e-4, 1e-3], batch=asked)
    assert digests(session) == before
    session.snapshot("before")
    session.update(asked)
    assert digests(session) != before
    session.restore("before")
    assert digests(session) == before
    return before


@pytest.mark.slow
def test_a_session_solves_the_tiny_task_and_takes_back_an_update(
    alone: None, tmp_path: Path
) -> None:
    config = SessionConfig.preset("tiny").replace("training.optimizer", "adamw8bit")
    with RLSession.start(config) as session:
        before = digests_after_an_undo(session)
        path = session.save(tmp_path / "saved")
        rows = responses_and_metrics([session.step()])
        session.train(27, show=False)
        assert session.evaluate().mean_reward >= 0.9
    with RLSession.load(path) as session:
        assert digests(session) == before
        assert responses_and_metrics([session.step()]) == rows
