"""A trainer that leaves its device and comes back, and one whose device is too small."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from kit.errors import StackError
from kit.trainer.actor import Trainer
from kit.trainer.step import warm_up
from tests.trainer.trainers import Make, backend, batch, make, weights

__all__ = ["make"]  # a fixture

SETTINGS = {"learning_rate": 1e-3, "kl_loss_coef": 0.01, "global_batch_size": 4}


def test_an_update_is_the_same_after_sleeping(make: Make) -> None:
    def run(sleeps: bool) -> tuple[torch.Tensor, Any]:
        trainer = make(**SETTINGS)
        for number in range(3):
            if sleeps:
                assert trainer.sleep() > 2 * 4 * 800_000  # weights and reference, later moments
                trainer.wake()
            metrics, _ = trainer.update(batch(number), str(number))
        return weights(trainer), metrics

    awake, slept = run(sleeps=False), run(sleeps=True)
    assert torch.equal(slept[0], awake[0])
    assert slept[1] == awake[1]


def test_a_sleeping_trainer_holds_no_tensor_of_its_models_on_the_device(make: Make) -> None:
    trainer = make(**SETTINGS)
    trainer.update(batch(), "a")
    everything = [x for x in backend(trainer).resident() if x.numel() > 1]
    trainer.sleep()
    assert {x.to_local().untyped_storage().nbytes() for x in everything} == {0}  # type: ignore[attr-defined]
    assert all(p.grad is None for p in backend(trainer).policy.parameters())
    trainer.wake()


@pytest.mark.slow
def test_warming_up_changes_no_weight_and_leaves_no_gradient(make: Make) -> None:
    trainer, other = make(**SETTINGS), make(**SETTINGS)
    before = weights(trainer)
    warm_up(trainer.backend, trainer.settings)
    assert torch.equal(weights(trainer), before)
    assert all(p.grad is None for p in backend(trainer).policy.parameters())
    assert trainer.update(batch(), "a") == other.update(batch(), "a")


def full(*_: Any) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. More words.")


def in_the_forward_pass(trainer: Trainer) -> Callable[[], None]:
    inner: Any = trainer.backend.module()
    return inner.model.layers[2].register_forward_hook(full).remove  # type: ignore[no-any-return]


def in_the_backward_pass(trainer: Trainer) -> Callable[[], None]:
    inner: Any = trainer.backend.module()

    def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(full)

    return inner.model.layers[1].register_forward_hook(hook).remove  # type: ignore[no-any-return]


@pytest.mark.parametrize("breaks", [in_the_forward_pass, in_the_backward_pass])
def test_too_little_memory_is_an_error_that_changes_nothing_and_the_next_update_works(
    make: Make, breaks: Callable[[Trainer], Callable[[], None]]
) -> None:
    untouched = make(**SETTINGS, max_tokens=20)
    untouched.update(batch(0), "a")
    untouched.update(batch(1), "b")
    expected = weights(untouched)

    trainer = make(**SETTINGS, max_tokens=20)  # several micro-batches: it breaks in the first
    trainer.update(batch(0), "a")
    before = weights(trainer)
    mend = breaks(trainer)
    with pytest.raises(StackError, match="out of device memory with micro-batches of 20") as error:
        trainer.update(batch(1), "b")
    assert "max_tokens_per_gpu" in str(error.value)
    assert "Tried to allocate 2.00 GiB" in str(error.value)
    mend()
    assert torch.equal(weights(trainer), before)
    assert trainer.update(batch(1), "b")[1]
    assert torch.equal(weights(trainer), expected)


def test_log_probs_work_after_they_lacked_memory(make: Make) -> None:
    trainer, given = make(), batch()
    expected = trainer.log_probs(given.tokens, given.response_lengths)
    mend = in_the_forward_pass(trainer)
    with pytest.raises(StackError, match="out of device memory"):
        trainer.log_probs(given.tokens, given.response_lengths)
    mend()
    assert trainer.log_probs(given.tokens, given.response_lengths) == expected
