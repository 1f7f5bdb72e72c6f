"""The trainer by itself: one FSDP2 rank in this process, without Ray and without an engine."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kit.errors import DataError, StackError, StoppedError
from kit.messages import TrainBatch
from kit.tiny import MODEL_DIR
from tests.cases import slow
from tests.trainer.trainers import PLAIN, Make, batch, make, weights

__all__ = ["make"]  # a fixture


def test_one_step_is_that_of_a_plain_loop_over_samples(make: Make) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32)
    given, trainer = batch(), make(**PLAIN)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.1, betas=(0.9, 0.98), eps=1.0, weight_decay=0.0
    )
    for row, count, mask, advantage in zip(
        given.tokens, given.response_lengths, given.loss_masks, given.advantages, strict=True
    ):
        logp = (model(torch.tensor([row])).logits[0] / 0.8).log_softmax(-1)
        places = range(len(row) - count, len(row))
        own = torch.stack([logp[place - 1, row[place]] for place in places])
        active = torch.tensor(mask)
        (-(advantage * own * active).sum() / active.sum() / len(given)).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    optimizer.step()

    before = weights(trainer)
    (metrics,), applied = trainer.update(given, "a")
    expected = torch.cat([p.detach().flatten() for p in model.parameters()])
    after = weights(trainer)
    assert applied
    assert (after - before).abs().max() > 1e-2
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-6)
    assert metrics["train/grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert metrics["train/pg_loss"] == pytest.approx(-sum(given.advantages) / 8, abs=1e-6)


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"calculate_per_token_loss": True, "entropy_coef": 0.1},
        {"global_batch_size": 4, "kl_loss_coef": 0.1},
    ],
)
def test_how_samples_are_packed_changes_no_weight(make: Make, extra: dict[str, Any]) -> None:
    results = []
    for limit in (1, 20, 100_000):
        trainer = make(**PLAIN | {"learning_rate": 0.01}, **extra, max_tokens=limit)
        before = weights(trainer)
        trainer.update(batch(), "a")
        results.append(weights(trainer))
        assert (results[-1] - before).abs().max() > 1e-3
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=1e-6)


def test_the_order_of_samples_within_a_step_changes_no_weight(make: Make) -> None:
    given, results = batch(), []
    for order in (range(8), [6, 1, 7, 0, 3, 5, 2, 4]):
        trainer = make(**PLAIN)
        moved = {
            name: [getattr(given, name)[i] for i in order]
            for name in ("tokens", "response_lengths", "loss_masks", "advantages")
        }
        trainer.update(TrainBatch(**moved, rollout_log_probs=None), "a")
        results.append(weights(trainer))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-6)


def test_the_same_update_twice_is_applied_once(make: Make) -> None:
    trainer = make(learning_rate=1e-4)
    first, applied = trainer.update(batch(), "a")
    after = weights(trainer)
    again, applied_again = trainer.update(batch(), "a")
    assert (applied, applied_again) == (True, False)
    assert again == first
    assert torch.equal(weights(trainer), after)
    assert trainer.state.optimizer_steps == 1
    assert trainer.update(batch(), "b")[1]
    assert not torch.equal(weights(trainer), after)


def test_a_rate_of_zero_changes_no_bit(make: Make) -> None:
    trainer = make(learning_rate=0.0, weight_decay=0.1)
    before = weights(trainer)
    (metrics,), _ = trainer.update(batch(), "a")
    assert metrics["train/grad_norm"] > 0
    assert torch.equal(weights(trainer), before)


@pytest.mark.parametrize("advantage", [math.nan, math.inf])
def test_an_advantage_that_is_no_number_is_refused_and_changes_no_bit(
    make: Make, advantage: float
) -> None:
    trainer = make(learning_rate=1e-4)
    before = weights(trainer)
    bad = replace(batch(), advantages=[advantage, *batch().advantages[1:]])
    with pytest.raises(StackError, match="The update was refused") as caught:
        trainer.update(bad, "a")
    assert "unchanged" in str(caught.value)
    assert torch.equal(weights(trainer), before)
    # The next good update is the one that a fresh trainer would make.
    trainer.update(batch(), "a")
    after = weights(trainer)
    fresh = make(learning_rate=1e-4)
    fresh.update(batch(), "a")
    assert torch.equal(weights(fresh), after)


def test_every_update_is_made_in_training_mode(make: Make) -> None:
    trainer, modes = make(), set[tuple[bool, bool]]()
    layers: Any = trainer.backend.module()
    layers.model.register_forward_pre_hook(
        lambda module, _: modes.add((torch.is_grad_enabled(), module.training))
    )
    trainer.update(batch(), "the first")
    trainer.log_probs(batch().tokens, batch().response_lengths)
    trainer.update(batch(), "the second")
    assert modes == {(True, True), (False, False)}


def test_an_update_that_broke_off_half_way_leaves_no_gradient_behind(make: Make) -> None:
    trainer = make(**PLAIN, max_tokens=1)
    good = batch()
    broken = replace(good, tokens=[[10**6, *row[1:]] if i == 7 else row for i, row in
                                   enumerate(good.tokens)])  # fmt: skip
    with pytest.raises(IndexError):
        trainer.update(broken, "a")
    trainer.update(good, "b")
    after = weights(trainer)
    fresh = make(**PLAIN, max_tokens=1)
    fresh.update(good, "b")
    assert torch.equal(weights(fresh), after)


def test_a_sample_without_a_prompt_is_refused(make: Make) -> None:
    bad = replace(batch(), tokens=[batch().tokens[0][-4:], *batch().tokens[1:]])
    with pytest.raises(DataError, match="no token comes before it"):
        make().update(bad, "a")


def test_the_gradient_is_clipped_to_the_limit_and_reported_as_it_was(make: Make) -> None:
    free = make(**PLAIN | {"adam_beta1": 0.5})
    start = weights(free)
    (metrics,), _ = free.update(batch(), "a")
    norm = metrics["train/grad_norm"]
    limit = norm / 10
    clipped = make(**PLAIN | {"adam_beta1": 0.5, "clip_grad": limit})
    (metrics,), _ = clipped.update(batch(), "a")
    assert metrics["train/grad_norm"] == pytest.approx(norm)
    # One step of AdamW: rate * g / (|g| + eps), so the gradient can be read off the weights.
    moved = (start - weights(clipped)).double() / PLAIN["learning_rate"]
    gradient = moved / (1 - moved.abs())
    assert gradient.norm().item() == pytest.approx(limit, rel=1e-3)


def test_a_global_batch_is_one_optimizer_step_each_against_the_weights_of_the_start(
    make: Make,
) -> None:
    trainer = make(**PLAIN, global_batch_size=2)
    metrics, _ = trainer.update(batch(), "a")
    assert trainer.state.optimizer_steps == len(metrics) == 4
    assert metrics[0]["train/ppo_kl"] == pytest.approx(0.0, abs=1e-6)
    assert abs(metrics[1]["train/ppo_kl"]) > 1e-4


def test_the_rate_follows_the_schedule_over_all_optimizer_steps_of_a_run(make: Make) -> None:
    # Two rollouts of four steps each; two of the eight are warm-up.
    trainer = make(
        learning_rate=0.8,
        lr_schedule="linear",
        warmup_steps=2,
        min_learning_rate=0.2,
        num_rollout=2,
        rollout_batch_size=2,
        n_samples_per_prompt=4,
        global_batch_size=2,
        adam_eps=1e3,
    )
    rates = [m["train/lr"] for name in "ab" for m in trainer.update(batch(), name)[0]]
    assert rates == pytest.approx([0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])


def test_log_probs_come_back_in_the_order_they_were_asked_for(make: Make) -> None:
    given = batch()
    one_by_one = make(max_tokens=1).log_probs(given.tokens, given.response_lengths)
    together = make().log_probs(given.tokens, given.response_lengths)
    assert [len(row) for row in together] == given.response_lengths
    for row, expected in zip(together, one_by_one, strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_the_reference_keeps_the_weights_of_the_start(make: Make) -> None:
    trainer = make(learning_rate=1e-3, kl_loss_coef=0.1)
    given = batch()
    start = trainer.log_probs(given.tokens, given.response_lengths)
    (first,), _ = trainer.update(given, "a")
    (second,), _ = trainer.update(given, "b")
    assert first["train/kl_loss"] == pytest.approx(0.0, abs=1e-6)
    assert second["train/kl_loss"] > 1e-4
    held = trainer.log_probs(given.tokens, given.response_lengths, "reference")
    assert held == start


def test_asking_for_a_reference_that_was_not_loaded_names_the_setting(make: Make) -> None:
    with pytest.raises(StackError, match=r"training\.kl_loss_coef"):
        make().log_probs([[1, 2]], [1], "reference")


class PutsUpASign(list[float]):
    """Advantages that make a file when so many micro-batches of one sample have been begun."""

    def __init__(self, advantages: list[float], at: int, file: Path) -> None:
        super().__init__(advantages)
        self.count, self.at, self.file = itertools.count(), at, file

    def __getitem__(self, index: Any) -> Any:
        if next(self.count) == self.at:
            self.file.touch()
        return super().__getitem__(index)


@pytest.mark.parametrize("micro_batch", [0, 3, 7])
@pytest.mark.parametrize("size", [4, *slow(None)])
def test_an_update_that_is_stopped_changes_no_bit_not_even_after_its_first_optimizer_step(
    make: Make, tmp_path: Path, micro_batch: int, size: int | None
) -> None:
    trainer = make(learning_rate=1e-2, max_tokens=1, global_batch_size=size)
    trainer.update(batch(1), "first")
    before, stop = trainer.state.digest(), tmp_path / "stop"
    given = batch()
    stopping = replace(given, advantages=PutsUpASign(given.advantages, micro_batch, stop))
    with pytest.raises(StoppedError):
        trainer.update(stopping, "a", str(stop))
    assert trainer.state.digest() == before
    trainer.update(given, "a")
    after = trainer.state.digest()
    fresh = make(learning_rate=1e-2, max_tokens=1, global_batch_size=size)
    fresh.update(batch(1), "first")
    fresh.update(given, "a")
    assert fresh.state.digest() == after


def test_a_step_that_is_refused_takes_back_the_earlier_ones_of_its_update(make: Make) -> None:
    trainer = make(learning_rate=1e-2, global_batch_size=4)
    before = trainer.state.digest()
    bad = replace(batch(), advantages=[*batch().advantages[:7], math.nan])
    with pytest.raises(StackError, match="refused"):
        trainer.update(bad, "a")
    assert trainer.state.digest() == before
    assert trainer.state.optimizer_steps == 0


@pytest.mark.parametrize(
    ("extra", "dtype"),
    [({}, "float32"), ({"global_batch_size": 4}, "float32"), ({}, "bfloat16")],
    ids=["one step", "two steps", "by two passes"],
)
def test_how_far_an_update_moved_the_policy_is_measured_on_its_own_tokens(
    make: Make, extra: dict[str, Any], dtype: str
) -> None:
    given = batch()
    trainer = make(**PLAIN | {"learning_rate": 0.01}, **extra)
    trainer.use(replace(trainer.settings, dtype=dtype))  # as it says how it is measured

    def log_probs() -> torch.Tensor:
        rows = trainer.log_probs(given.tokens, given.response_lengths)
        return torch.cat([torch.as_tensor(row, dtype=torch.float64) for row in rows])

    before = log_probs()
    rows, _ = trainer.update(given, "a")
    change = (log_probs() - before)[torch.tensor([*itertools.chain(*given.loss_masks)]) != 0]
    expected = (change.exp() - 1 - change).mean().item()
    assert expected > 1e-5
    assert [row["train/update_kl"] for row in rows] == [
        pytest.approx(expected, rel=1e-2, abs=1e-7)
    ] * len(rows)
