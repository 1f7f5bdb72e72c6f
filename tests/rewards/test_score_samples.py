"""A bad rollout is data, not a crash; a reward function of the wrong form is an error."""

import asyncio
import bdb
import functools
import signal
import threading
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import torch

from kit.errors import RewardError
from kit.rewards import failure_summary, score_samples
from kit.rewards.runner import Scoring
from kit.samples import Rollout, Sample, Status


def samples(n: int = 4) -> list[Sample]:
    return [Sample(index=i, response=str(i), label="1", status=Status.COMPLETED) for i in range(n)]


def rewards(reward: Any, n: int = 4) -> list[float | None]:
    return [sample.reward for sample in score_samples(samples(n), reward)]


def errors(reward: Any, n: int = 4) -> list[str | None]:
    return [sample.error for sample in score_samples(samples(n), reward)]


def test_names_weights_and_functions_all_grade() -> None:
    assert rewards("exact") == [0.0, 1.0, 0.0, 0.0]
    assert rewards({"exact": 0.5, "number": 0.25}) == [0.0, 0.75, 0.0, 0.0]
    assert rewards(lambda sample: int(sample.response)) == [0.0, 1.0, 2.0, 3.0]
    assert rewards(lambda samples: [s.index for s in samples]) == [0.0, 1.0, 2.0, 3.0]
    scored = score_samples(Rollout(samples()), "exact")
    assert [s.status for s in scored] == [Status.COMPLETED] * 4


def listed(items: list[Sample]) -> list[float]:
    return [1.0] * len(items)


def sequenced(items: Sequence[Sample]) -> Any:
    return np.ones(len(items))


def quoted(items: "Sequence[Sample]") -> Any:
    return torch.ones(len(items))


class Judge:
    def __call__(self, rollout: Any) -> list[float]:
        return [1.0] * len(rollout)

    def one(self, sample: Sample, strict: bool = False) -> float:
        return 1.0


@pytest.mark.parametrize(
    "function",
    [
        listed,
        sequenced,
        quoted,
        Judge(),
        Judge().one,
        functools.partial(Judge().one, strict=True),
        lambda samples: (1 for _ in samples),
        lambda x: 1,
    ],
)
def test_a_function_is_called_in_the_way_that_its_signature_says(
    function: Callable[..., Any],
) -> None:
    assert rewards(function) == [1.0] * 4


@pytest.mark.parametrize(
    "value",
    [
        1,
        1.0,
        True,
        np.float32(1),
        np.int64(1),
        np.bool_(True),
        np.array(1.0),
        torch.tensor(1.0),
        torch.tensor(True),
        torch.ones((), requires_grad=True),
        Decimal(1),
    ],
)
def test_every_kind_of_single_number_is_a_reward(value: Any) -> None:
    assert rewards(lambda sample: value, 1) == [1.0]
    assert rewards(lambda samples: [value], 1) == [1.0]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "None: is a `return` missing?"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        ("1.0", "'1.0' (str)"),
        ([1.0], "a list of 1 values"),
        ([1.0, 2.0], "a list of 2 values"),
        (np.ones(1), "shape (1,)"),
        (torch.ones(2), "shape (2,)"),
        (torch.tensor(torch.nan), "nan"),
        ({"reward": "yes"}, "'yes' (str)"),
        ({"right": 1, "read": "72"}, "in 'read': the reward function returned '72' (str)"),
        ({}, "an empty mapping"),
        (1j, "complex"),
        (10**400, "out of range"),
    ],
)
def test_what_is_no_number_marks_its_sample(value: Any, words: str) -> None:
    scored = score_samples(samples(3), lambda sample: value if sample.index == 1 else 0.5)
    assert [s.reward for s in scored] == [0.5, None, 0.5]
    assert scored[1].status is Status.FAILED
    assert words in str(scored[1].error)


def test_a_function_that_raises_marks_its_sample_and_names_the_line() -> None:
    def reward(sample: Sample) -> float:
        if sample.index == 2:
            return float("not a number")
        return 1.0

    scored = score_samples(samples(), reward)
    assert [s.reward for s in scored] == [1.0, 1.0, None, 1.0]
    assert scored[2].error == (
        "ValueError: could not convert string to float: 'not a number' (line 3 of reward function)"
    )


def test_the_line_is_the_reward_functions_own_where_a_helper_raises() -> None:
    def helper() -> float:
        raise KeyError("answer")

    def reward(sample: Sample) -> float:
        return helper()

    assert errors(reward, 1) == ["KeyError: 'answer' (line 2 of reward function)"]


def test_a_batch_function_that_raises_marks_all() -> None:
    def reward(samples: list[Sample]) -> list[float]:
        raise ValueError("no judge")

    assert errors(reward, 3) == ["ValueError: no judge (line 2 of reward function)"] * 3


def test_one_bad_value_of_a_batch_marks_only_its_sample() -> None:
    assert rewards(lambda samples: [1.0, None, 2.0, float("nan")]) == [1.0, None, 2.0, None]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0, 2.0, 3.0], "returned 3 rewards for 4 samples"),
        ([], "returned 0 rewards for 4 samples"),
        (np.ones(1), "returned 1 rewards for 4 samples"),
        (1.0, "a single value for 4 samples"),
        (torch.tensor(1.0), "a single value for 4 samples"),
        (None, "a single value for 4 samples"),
        ("1234", "a single value for 4 samples"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "a single value for 4 samples"),
        ({1.0, 2.0, 3.0, 4.0}, "a set of 4 values, which has no order"),
        ({"right": [1.0] * 4, "short": [1.0] * 3}, "a single value for 4 samples"),
    ],
)
def test_a_batch_function_that_returns_the_wrong_number_is_told_both_numbers(
    returned: Any, words: str
) -> None:
    with pytest.raises(RewardError, match=words):
        score_samples(samples(), lambda samples: returned)


def test_aborted_samples_keep_no_reward_and_are_not_shown_to_the_function() -> None:
    rollout = samples()
    rollout[1] = replace(rollout[1], status=Status.ABORTED, reward=0.5)
    scored = score_samples(rollout, lambda samples: [float(s.index) for s in samples])
    assert [s.reward for s in scored] == [0.0, None, 2.0, 3.0]
    assert scored[1].status is Status.ABORTED
    assert score_samples([], "exact") == []
    assert score_samples([rollout[1]], lambda samples: 1 / 0)[0].reward is None


def test_samples_that_come_in_another_order_get_the_same_rewards() -> None:
    async def judge(sample: Sample) -> float:
        await asyncio.sleep(0)
        return float(sample.response)

    def one(sample: Sample) -> float:
        return float(sample.response)

    def batch(samples: list[Sample]) -> list[float]:
        return [float(place) for place in range(len(samples))]

    for function in (one, judge, batch):
        rollout = samples()
        with Scoring(function) as scoring:
            for place in (2, 0, 3, 1):
                scoring.add(place, rollout[place])
            scoring.finish()
        scored = [scoring.scored[place].sample for place in range(4)]
        assert scored == score_samples(rollout, function)
        assert [s.reward for s in scored] == [0.0, 1.0, 2.0, 3.0]


def test_a_reward_function_sees_the_callers_context_variables() -> None:
    run: ContextVar[str] = ContextVar("run")

    async def judge(sample: Sample) -> float:
        return float(run.get())

    async def judge_all(samples: list[Sample]) -> list[float]:
        return [float(run.get())] * len(samples)

    run.set("7")
    for function in (judge, judge_all):
        assert rewards(function) == [7.0] * 4


def test_async_functions_wait_together() -> None:
    waiting = 0
    everyone_is_here: list[asyncio.Event] = []

    async def judge(sample: Sample) -> float:
        nonlocal waiting
        if not everyone_is_here:
            everyone_is_here.append(asyncio.Event())
        waiting += 1
        if waiting == 4:
            everyone_is_here[0].set()
        await everyone_is_here[0].wait()
        if sample.index == 3:
            raise TimeoutError("judge is down")
        return 1.0

    scored = score_samples(samples(), judge)
    assert [s.reward for s in scored] == [1.0, 1.0, 1.0, None]
    assert str(scored[3].error).startswith("TimeoutError: judge is down (line ")


def test_async_works_for_batches_and_inside_a_running_loop() -> None:
    async def judge(samples: list[Sample]) -> list[float]:
        await asyncio.sleep(0)
        return [1.0] * len(samples)

    async def cell() -> list[float | None]:
        return rewards(judge)

    assert asyncio.run(cell()) == [1.0] * 4


def test_a_forgotten_await_is_explained() -> None:
    async def judge(sample: Sample) -> float:
        return 1.0

    assert "coroutine" in str(errors(lambda sample: judge(sample), 1)[0])


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, bdb.BdbQuit])
def test_an_interrupt_is_never_swallowed(interrupt: type[BaseException]) -> None:
    def one(sample: Sample) -> float:
        raise interrupt

    def batch(samples: list[Sample]) -> list[float]:
        raise interrupt

    async def waiting(sample: Sample) -> float:
        raise interrupt

    for function in (one, batch, waiting):
        with pytest.raises(interrupt):
            score_samples(samples(), function)


class OwnEnd(BaseException):
    """What a library may raise so that no `except Exception` holds it up."""


@pytest.mark.parametrize("error", [SystemExit(0), OwnEnd(), asyncio.CancelledError()])
def test_what_would_end_the_program_marks_the_sample_alone(error: BaseException) -> None:
    def one(sample: Sample) -> float:
        if sample.index == 2:
            raise error
        return 1.0

    async def waiting(sample: Sample) -> float:
        await asyncio.sleep(0)
        return one(sample)

    def in_thread(found: list[Any]) -> None:
        found += rewards(one)

    found: list[Any] = []
    thread = threading.Thread(target=in_thread, args=(found,))
    thread.start()
    thread.join()
    for scored in (rewards(one), rewards(waiting), found):
        assert scored == [1.0, 1.0, None, 1.0]
    assert type(error).__name__ in str(errors(one)[2])
    assert type(error).__name__ in str(errors(waiting)[2])


@pytest.mark.parametrize("error", [SystemExit(0), OwnEnd()])
def test_what_would_end_the_program_in_a_function_of_all_samples_marks_all(
    error: BaseException,
) -> None:
    def batch(samples: list[Sample]) -> list[float]:
        raise error

    async def waiting(samples: list[Sample]) -> list[float]:
        raise error

    for function in (batch, waiting):
        assert rewards(function) == [None] * 4
        assert type(error).__name__ in str(errors(function)[0])


def test_an_interrupt_ends_async_rewards_that_wait_for_ever() -> None:
    cancelled = threading.Event()
    notebook = threading.get_ident()

    async def judge(sample: Sample) -> float:
        if sample.index == 3:
            signal.pthread_kill(notebook, signal.SIGINT)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        score_samples(samples(), judge)
    assert cancelled.is_set()


@pytest.mark.parametrize("function", [lambda: 1.0, lambda a, b: 1.0, lambda *, a: 1.0])
def test_a_function_of_the_wrong_form_is_an_error(function: Callable[..., Any]) -> None:
    with pytest.raises(RewardError, match="nothing says what it wants"):
        score_samples(samples(), function)


def test_an_interrupt_keeps_the_rewards_of_async_calls_that_were_done() -> None:
    async def judge(sample: Sample) -> float:
        if sample.index == 3:
            await asyncio.sleep(0)  # after the others
            raise KeyboardInterrupt
        return 1.0

    def score(scoring: Scoring) -> None:
        with scoring:
            for place, sample in enumerate(samples()):
                scoring.add(place, sample)
            scoring.finish()

    scoring = Scoring({"judge": judge, "exact": 0.5})
    with pytest.raises(KeyboardInterrupt):
        score(scoring)
    assert [scoring.scored[place].sample.reward for place in range(3)] == [1.0, 1.5, 1.0]
    assert 3 not in scoring.scored


def test_a_class_in_place_of_an_object_is_an_error() -> None:
    with pytest.raises(RewardError, match=r"Judge is a class.*\n.*Judge\(\.\.\.\)"):
        score_samples(samples(), Judge)


def test_what_is_no_reward_at_all_is_an_error() -> None:
    wrong = (
        (3, "cannot be 3"),
        ({}, "empty"),
        ([], "empty"),
        ("exakt", "Did you mean 'exact'"),
        ({"exakt": 0.5}, "Did you mean 'exact'"),
        ({"short": 0.5}, r"\{'short': \(my_function, 0.5\)\}"),
        ({"exact": 0.0, "number": 0}, "all 0"),
        ({"exact": float("nan")}, "weight of the reward exact is nan"),
        (["exact", "exact"], "Two rewards of the list are called 'exact'"),
        ([3], "cannot be 3"),
    )
    for reward, words in wrong:
        with pytest.raises(RewardError, match=words):
            score_samples(samples(), reward)


def test_a_missing_label_fails_the_sample_and_not_the_rollout() -> None:
    rollout = [*samples(1), Sample(response="1"), Sample(response="1", label="1")]
    scored = score_samples(rollout, "exact")
    assert [s.reward for s in scored] == [0.0, None, 1.0]
    assert "data.label_key" in str(scored[1].error)


def test_scoring_again_gives_failed_samples_their_status_back() -> None:
    rollout = [
        replace(sample, status=status, metadata={"n": 1})
        for sample, status in zip(samples(2), (Status.COMPLETED, Status.TRUNCATED), strict=True)
    ]
    failed = score_samples(rollout, lambda sample: None)
    assert [s.status for s in failed] == [Status.FAILED] * 2
    failed = score_samples([Sample.from_dict(s.to_dict()) for s in failed], lambda sample: None)
    again = score_samples(failed, lambda sample: 1.0)
    assert again == [replace(sample, reward=1.0) for sample in rollout]


def test_equal_failures_are_told_once_with_their_number() -> None:
    def reward(sample: Sample) -> float | None:
        if sample.index == 0:
            raise ValueError("odd")
        return None if sample.index < 3 else 1.0

    assert failure_summary(score_samples(samples(), reward)) == [
        "2 of 4 samples: the reward function returned None: is a `return` missing?",
        "1 of 4 samples: ValueError: odd (line 3 of reward function)",
    ]
    assert failure_summary(score_samples(samples(), "exact")) == []
