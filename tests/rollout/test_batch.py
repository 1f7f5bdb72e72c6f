"""What each estimator makes of the rewards of a rollout, worked out by hand."""

from collections.abc import Sequence

import pytest

from kit.config import TrainingConfig
from kit.errors import DataError, SessionError
from kit.rollout.batch import make_batch
from kit.samples import Batch, Rollout, Sample, Status

GROUPS, LENGTHS, REWARDS = [0, 0, 1, 1], [2, 1, 3, 1], [1.0, 0.0, 4.0, 4.0]


def rollout(**first: object) -> Rollout:
    samples = [
        Sample(
            group_index=group,
            index=i,
            tokens=[5, 6] + [7] * length,
            response_length=length,
            reward=reward,
            status=Status.COMPLETED,
            **(first if i == 0 else {}),  # type: ignore[arg-type]
        )
        for i, (group, length, reward) in enumerate(zip(GROUPS, LENGTHS, REWARDS, strict=True))
    ]
    return Rollout(samples, step=3)


def ask(samples: Sequence[Sample], of: str) -> list[list[float]]:
    """A policy 0.1 nats above its reference, and a critic that always expects 1."""
    value = {"policy": -1.0, "reference": -1.1, "values": 1.0}[of]
    return [[value] * s.response_length for s in samples]


def made(estimator: str, **settings: object) -> Batch:
    training = TrainingConfig(advantage_estimator=estimator, kl_loss_type="k1", **settings)  # type: ignore[arg-type]
    return make_batch(rollout(), training, ask)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("grpo", [0.5 / (0.5**0.5 + 1e-6), -0.5 / (0.5**0.5 + 1e-6), 0.0, 0.0]),
        ("gspo", [0.5 / (0.5**0.5 + 1e-6), -0.5 / (0.5**0.5 + 1e-6), 0.0, 0.0]),
        ("dr_grpo", [0.5, -0.5, 0.0, 0.0]),
        ("rloo", [1.0, -1.0, 0.0, 0.0]),
    ],
)
def test_estimators_by_sample_give_one_advantage_each(
    estimator: str, expected: list[float]
) -> None:
    batch = made(estimator)
    assert batch.advantages == pytest.approx(expected)
    assert batch.token_advantages is None
    assert batch.step == 3


def test_kl_in_the_reward_costs_a_sample_its_length() -> None:
    # 0.1 nats a token: rewards 1 - 0.2, 0 - 0.1, 4 - 0.3, 4 - 0.1.
    batch = made("dr_grpo", kl_coef=1.0)
    assert batch.advantages == pytest.approx([0.45, -0.45, -0.1, 0.1])


def test_reinforce_plus_plus_gives_each_token_what_is_to_come() -> None:
    batch = made("reinforce_plus_plus", kl_coef=1.0, normalize_advantages=False)
    rows = batch.token_advantages
    assert rows is not None
    assert [list(row) for row in rows] == [
        pytest.approx(row) for row in ([0.8, 0.9], [-0.1], [3.7, 3.8, 3.9], [3.9])
    ]
    assert batch.advantages == pytest.approx([0.85, -0.1, 3.8, 3.9])


def test_reinforce_plus_plus_is_normalised_over_the_batch_unless_told_not_to() -> None:
    rows = made("reinforce_plus_plus").token_advantages
    assert rows is not None
    flat = [x for row in rows for x in row]
    assert sum(flat) == pytest.approx(0.0, abs=1e-9)
    assert sum(x * x for x in flat) / (len(flat) - 1) == pytest.approx(1.0, abs=1e-6)
    assert made("grpo", normalize_advantages=True).advantages != made("grpo").advantages


def test_the_baseline_form_has_no_advantage_where_a_group_agrees() -> None:
    rows = made("reinforce_plus_plus_baseline", normalize_advantages=False).token_advantages
    assert rows == ((0.5, 0.5), (-0.5,), (0.0, 0.0, 0.0), (0.0,))


def test_ppo_compares_with_what_the_critic_expected() -> None:
    batch = made("ppo", normalize_advantages=False)
    assert batch.token_advantages == ((0.0, 0.0), (-1.0,), (3.0, 3.0, 3.0), (3.0,))
    assert batch.returns == ((1.0, 1.0), (0.0,), (4.0, 4.0, 4.0), (4.0,))
    assert batch.values == ((1.0, 1.0), (1.0,), (1.0, 1.0, 1.0), (1.0,))


def test_a_group_with_a_failed_sample_is_left_out_by_name() -> None:
    failed = rollout()
    samples = [failed[0].with_failure("ValueError: no"), *failed[1:]]
    batch = make_batch(Rollout(samples), TrainingConfig(), ask)
    assert [s.index for s in batch.samples] == [2, 3]
    assert batch.left_out[0].startswith("group 0")
    everything = [s.with_failure("no") for s in failed]
    assert len(make_batch(Rollout(everything), TrainingConfig(), ask)) == 0


@pytest.mark.parametrize("estimator", ["grpo", "ppo"])
def test_a_rollout_without_rewards_is_refused(estimator: str) -> None:
    bare = Rollout([Sample(tokens=[1, 2], response_length=1, status=Status.COMPLETED)] * 2)
    training = TrainingConfig(advantage_estimator=estimator)  # type: ignore[arg-type]
    with pytest.raises(SessionError, match="no rewards"):
        make_batch(bare, training, ask)


@pytest.mark.parametrize("name", ["token_advantages", "values", "returns"])
def test_a_batch_whose_tokens_do_not_fit_is_refused(name: str) -> None:
    samples = tuple(rollout()[:2])
    with pytest.raises(DataError, match=rf"{name} .* \[2, 1\] tokens"):
        Batch(samples, (0.0, 0.0), **{name: ((1.0,), (1.0,))})  # type: ignore[arg-type]
