"""Rewards as people have them: several with weights, parts, and functions of other libraries."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import Any

import pytest

from kit.errors import RewardError
from kit.rewards import score_samples
from kit.rewards.signature import Form, reward_name
from kit.samples import Rollout, Sample, Status
from kit.tracking.metrics import rollout_metrics

ROWS = [
    Sample(
        index=i,
        prompt="1 + 1" if i < 2 else [{"role": "user", "content": "1 + 1"}],
        tokens=[7, 8, 9],
        response=str(i),
        response_length=2,
        label="2",
        metadata={"level": i, "data_source": "sums", "extra_info": {"index": i}},
        status=Status.COMPLETED,
    )
    for i in range(3)
]


def rewards(reward: Any) -> list[float | None]:
    return [sample.reward for sample in score_samples(ROWS, reward)]


def short(sample: Sample) -> float:
    return -float(sample.response_length)


def by_index(samples: list[Sample]) -> list[float]:
    return [float(sample.index) for sample in samples]


async def asks(sample: Sample) -> float:
    await asyncio.sleep(0)
    return 10.0 * sample.index


# ---- several -------------------------------------------------------------------------------------


def test_several_rewards_are_summed_with_their_weights_and_kept_by_name() -> None:
    reward = {"exact": 0.5, "short": (short, 0.1), "index": (2, by_index), "asked": asks}
    scored = score_samples(ROWS, reward)
    assert [s.reward for s in scored] == pytest.approx([-0.2, 11.8, 24.3])
    assert scored[2].reward_parts == {"exact": 1.0, "short": -2.0, "index": 2.0, "asked": 20.0}
    assert reward_name(reward) == "0.5*exact + 0.1*short + 2*index + 1*asked"


def test_a_list_of_rewards_takes_their_own_names_and_the_weight_1() -> None:
    scored = score_samples(ROWS, ["exact", short, (by_index, 0.5)])
    assert scored[2].reward == 1.0 - 2.0 + 0.5 * 2
    assert scored[2].reward_parts == {"exact": 1.0, "short": -2.0, "by_index": 2.0}


def test_a_weight_of_0_only_looks() -> None:
    scored = score_samples(ROWS, {"exact": 1.0, "short": (short, 0)})
    assert [s.reward for s in scored] == [0.0, 0.0, 1.0]
    assert [s.reward_parts["short"] for s in scored] == [-2.0] * 3


def test_one_that_fails_is_named_and_the_parts_of_the_others_are_kept() -> None:
    def odd(sample: Sample) -> float:
        if sample.index == 1:
            raise KeyError("odd")
        return 1.0

    scored = score_samples(ROWS, {"exact": 1.0, "odd": odd})
    assert [s.reward for s in scored] == [1.0, None, 2.0]
    assert scored[1].error == "odd: KeyError: 'odd' (line 3 of reward function)"
    assert scored[1].status is Status.FAILED
    assert score_samples(scored, "exact")[1].status is Status.COMPLETED


def test_parts_are_columns_in_tables_metrics_pandas_and_files(tmp_path: Any) -> None:
    rollout = Rollout(score_samples(ROWS, {"exact": 1.0, "short": (short, 0.1)}))
    table = rollout.to_pandas()
    assert list(table["reward/exact"]) == [0.0, 0.0, 1.0]
    assert rollout_metrics(rollout)["rollout/reward/exact"] == pytest.approx(1 / 3)
    assert Rollout.load(rollout.save(tmp_path / "rollout.jsonl")) == rollout
    shown = rollout._repr_mimebundle_()
    assert "short" in shown["text/html"]
    assert "short -2" in shown["text/plain"]


def test_weights_in_the_settings_keep_their_parts_too() -> None:
    from kit.config import RewardConfig
    from kit.rewards import build

    reward = build(RewardConfig(weights={"exact": 0.75, "number": 0.25}), "exact")
    assert score_samples(ROWS, reward)[2].reward_parts == {"exact": 1.0, "number": 1.0}


# ---- parts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "reward", "parts"),
    [
        ({"score": 0.5, "acc": True, "pred": "72"}, 0.5, {"acc": 1.0}),
        ({"reward": 2, "format": 1}, 2.0, {"format": 1.0}),
        ({"right": 1, "format": 0.5}, 1.5, {"right": 1.0, "format": 0.5}),
        ({"right": 1}, 1.0, {"right": 1.0}),
    ],
)
def test_a_mapping_is_the_parts_of_a_reward(
    value: Any, reward: float, parts: dict[str, float]
) -> None:
    for function in (lambda sample: value, lambda samples: [value] * len(samples)):
        scored = score_samples(ROWS, function)
        assert [s.reward for s in scored] == [reward] * 3
        assert scored[0].reward_parts == parts


def test_a_function_of_all_samples_may_return_a_list_for_each_part() -> None:
    scored = score_samples(ROWS, lambda samples: {"right": [1, 0, 1], "format": [0.5, 0.5, 0]})
    assert [s.reward for s in scored] == [1.5, 0.5, 1.0]
    assert scored[1].reward_parts == {"right": 0.0, "format": 0.5}


# ---- the forms of other libraries ----------------------------------------------------------------


def trl(prompts: Any, completions: Any, level: Any, **columns: Any) -> list[float]:
    assert prompts[0] == "1 + 1"
    assert completions[0] == "0"
    assert completions[2] == [{"role": "assistant", "content": "2"}]
    assert set(columns) == {"data_source", "extra_info", "label"}
    return [float(one) for one in level]


def trl_alone(completions: Any, **_: Any) -> list[float]:
    return [float(index) for index in range(len(completions))]


def trl_answer(completions: Any, answer: Any) -> list[float]:
    assert answer == ["2"] * 3
    return [0.0, 1.0, 2.0]


async def trl_async(prompts: Any, completions: Any, completion_ids: Any) -> list[float]:
    assert completion_ids == [[8, 9]] * 3
    return [0.0, 1.0, 2.0]


def verl(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> Any:
    assert (data_source, ground_truth, extra_info["index"]) == ("sums", "2", int(solution_str))
    return {"score": float(solution_str), "acc": solution_str == ground_truth}


def verl_more(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any, **_: Any
) -> float:
    return float(solution_str)


async def slime(args: Any, sample: Sample, **_: Any) -> float:
    return float(sample.index)


async def slime_all(args: Any, samples: Any, **_: Any) -> list[float]:
    return by_index(samples)


def text_and_label(response: str, label: str) -> float:
    assert label == "2"
    return float(response)


def text_alone(response: str) -> float:
    return float(response)


def by_keyword(*, sample: Sample) -> float:
    return float(sample.index)


def with_a_column(response: str, level: int) -> float:
    assert response == str(level)
    return float(level)


def bound(response: str, label: str, scale: float) -> float:
    return scale * float(response)


@pytest.mark.parametrize(
    "function",
    [
        trl, trl_alone, trl_answer, trl_async, verl, verl_more, slime, slime_all, text_and_label,
        text_alone, by_keyword, with_a_column, functools.partial(bound, scale=1.0),
    ],
)  # fmt: skip
def test_a_function_written_for_another_library_is_called_as_that_one_calls_it(
    function: Callable[..., Any],
) -> None:
    scored = score_samples(ROWS, function)
    assert [s.error for s in scored] == [None] * 3
    assert [s.reward for s in scored] == [0.0, 1.0, 2.0]


def test_a_column_that_the_data_lacks_is_named_beside_those_that_it_has() -> None:
    def wants(response: str, levle: int) -> float:
        return 1.0

    def wants_all(completions: Any, levle: Any) -> list[float]:
        return [1.0] * len(completions)

    for function in (wants, wants_all):
        error = str(score_samples(ROWS, function)[0].error)
        assert "'levle'" in error
        assert "Did you mean 'level'?" in error


def test_what_slime_has_in_args_is_told_to_be_elsewhere() -> None:
    def reward(args: Any, sample: Sample) -> float:
        return float(args.rm_url)

    assert "the kit has no args.rm_url" in str(score_samples(ROWS, reward)[0].error)


def test_a_parameter_that_names_its_type_gets_a_sample_whatever_it_is_called() -> None:
    def reward(response: Sample) -> float:
        return float(response.index)

    assert Form.of(reward).names is None
    assert rewards(reward) == [0.0, 1.0, 2.0]


def test_two_parameters_that_mean_nothing_are_refused_with_the_names_that_do() -> None:
    with pytest.raises(RewardError, match=r"takes \(x, y\)(.|\n)*solution_str(.|\n)*completions"):
        Form.of(lambda x, y: 1.0)
