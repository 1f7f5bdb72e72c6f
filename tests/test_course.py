"""The exercises: what is open, wrong and right is told apart, in words that help."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import nbformat
import numpy
import pytest

from kit.config import TrainingConfig
from kit.course import check, exercises
from kit.errors import DataError
from kit.reports import EvalReport, TrainReport
from kit.reports.what_if import Movement, Trial
from kit.samples import Rollout, Sample
from tests.lessons import LESSONS, NOTEBOOKS, exercise_cells, solutions


def grouped(*groups: tuple[tuple[str, str, float], ...]) -> Rollout:
    """A rollout of (response, label, reward), group by group."""
    return Rollout(
        Sample(group_index=number, prompt=f"q{number}", response=text, label=label, reward=reward)
        for number, group in enumerate(groups)
        for text, label, reward in group
    )


def evaluated(*rewards: float) -> EvalReport:
    rollout = grouped(*(((str(reward), "1", reward),) for reward in rewards))
    share = sum(rewards) / len(rewards)
    return EvalReport("held out", share, len(rewards), 1, 0.0, {1: share}, rollout, 0, 1.0)


def trained(*rewards: float) -> TrainReport:
    return TrainReport(history=tuple({"rollout/raw_reward": reward} for reward in rewards))


def greedy(text: str, *answers: str) -> Rollout:
    return Rollout(Sample(prompt=text, response=answer) for answer in answers)


def steps_pay(sample: Sample) -> float:
    return float(sample.response.endswith(str(sample.label))) + sample.response.count(">")


THREE_GROUPS = grouped(
    (("1", "1", 1.0), ("2", "1", 0.0)),
    (("1", "1", 1.0), ("1", "1", 1.0)),
    (("2", "1", 0.0), ("2", "1", 0.0)),
    (("2", "1", 0.0), ("3", "1", 0.0)),
)
BEFORE, AFTER = evaluated(1, 0, 0, 0, 1), evaluated(0, 1, 1, 0, 1)
SLIPPED = grouped((("=8", "8", 1.0), ("3>1>6>7=7", "8", 0.0)), (("=3", "8", 0.0), ("=4", "8", 0.0)))
ROWS = [{"rollout/zero_std/count_0": 2.0, "rollout/zero_std/count_1": 3.0}, {}, {"step": 1.0}]


def ess(log_ratios: list[float]) -> float:
    weights = [math.exp(x) for x in log_ratios]
    return sum(weights) ** 2 / len(weights) / sum(w * w for w in weights)


def k3(changes: list[float]) -> float:
    return sum(math.exp(c) - 1 - c for c in changes) / len(changes)


def trial(rate: float, kl: float) -> Trial:
    moved = Movement(8, 0.1, 0.2, kl, 0.1, -0.1, 0.6)
    return Trial("", {}, TrainingConfig(learning_rate=rate), None, moved, None)


TRIED = [trial(1e-4, 0.009), trial(1e-5, 1e-4), trial(1e-3, 0.9)]


def without_deviation(rewards: list[float]) -> list[float]:
    return [r - sum(rewards) / len(rewards) for r in rewards]


def in_groups(
    row: Any, group: int, *, most: int = 7, read: bool = True, rounds: Any = numpy.round,
    size: Any = numpy.abs,
) -> Any:  # fmt: skip
    groups = row.reshape(-1, group)
    scales = size(groups).max(1, keepdims=True) / most
    return (rounds(groups / scales) * (scales if read else 1)).ravel()


def drafted(right: float, length: int) -> float:
    return sum(right**place for place in range(length + 1))


def best_draft(speed: Callable[[float, float, int], float]) -> Callable[[float, float], int]:
    return lambda right, cost: max(range(21), key=lambda length: speed(right, cost, length))


RIGHT: list[tuple[str, Any, dict[str, Any]]] = [
    ("01.1", 1.62, {}),
    ("01.2", 3, {"rollout": THREE_GROUPS}),
    ("01.3", greedy("12+34=", "46", "46", "46", "46"), {}),
    ("02.1", 2, {"training": trained(0.4, 0.7, 0.8, 0.7)}),
    ("02.1", -1, {"training": trained(0.4, 0.7)}),
    ("02.2", 2, {"before": BEFORE, "after": AFTER}),
    ("02.3", 0.2191, {"before": AFTER}),
    ("03.1", 0.8187, {}),
    ("03.3", ess, {}),
    ("03.3", lambda x: numpy.float32(ess(x)), {}),
    ("04.1", "1>2>3>4>5>6>7>", {}),
    ("04.3", 1, {"rollout": SLIPPED, "reward": steps_pay}),
    ("05.2", (False, True, True, False), {}),
    ("06.2", 3, {"reward": [0.4, 0.8, 0.5, 0.3, 0.1]}),
    ("06.2", -1, {"reward": [0.4, 0.5, 0.6]}),
    ("06.3", 1, {"rows": ROWS, "groups": 16}),
    ("07.1", (4, 6), {}),
    ("07.2", 1e-4, {"tried": TRIED}),
    ("07.2", 0, {"tried": TRIED[2:]}),
    ("07.3", k3, {}),
    ("08.1", (1e8, -1e8, 1.0), {}),
    ("08.1", [1, 2**-24, 2**-24], {}),
    ("08.2", [32, 96, 256], {}),
    ("08.3", lambda e, t: sum(len({*x} & {*y}) for x, y in zip(e, t, strict=True)) / 6, {}),
    ("09.1", 81920, {}),
    ("09.2", [False, True, True, True], {}),
    ("09.3", lambda w, a, b, alpha: w + alpha / len(a) * b @ a, {}),
    ("09.3", lambda w, a, b, alpha: (w + alpha / 3 * b.dot(a)).tolist(), {}),
    ("13.1", 1.875, {}),
    ("13.2", [7, 2, 5], {}),
    ("13.2", (7, 2, numpy.int64(5)), {}),
    ("13.3", best_draft(lambda r, c, k: drafted(r, k) / (1 + k * c)), {}),
    (
        "13.3",
        lambda r, c: numpy.argmax([drafted(r, k) / (1 + k * c) for k in range(21)]),
        {},
    ),
    ("14.1", 4.25, {}),
    ("14.2", [0, 2, -4, 7], {}),
    ("14.2", (0.0, 2, numpy.int8(-4), 7), {}),
    ("14.3", lambda row, group: in_groups(row, group), {}),
    ("14.3", lambda row, group: in_groups(row, group).tolist(), {}),
]

WRONG: list[tuple[str, Any, dict[str, Any], str]] = [
    ("01.1", 0.75, {}, "standard deviation"),
    ("01.1", 1.7321, {}, "n - 1"),
    ("01.1", 1.0, {}, "too small"),
    ("01.1", "1.62", {}, "A number is asked for"),
    ("01.1", True, {}, "A number is asked for"),
    ("01.1", math.nan, {}, "not a number"),
    ("01.2", 1, {"rollout": THREE_GROUPS}, "do teach"),
    ("01.2", 2, {"rollout": THREE_GROUPS}, "All right is as equal"),
    ("01.2", 6, {"rollout": THREE_GROUPS}, "Count groups"),
    ("01.3", "46", {}, "session.generate"),
    ("01.3", greedy("12+34=", "46", "46"), {}, "n_samples_per_prompt=4"),
    ("01.3", greedy("12+34=", "46", "46", "36", "46"), {}, "temperature=0"),
    ("01.3", greedy("1+1=", *["2"] * 4), {}, "12+34="),
    ("02.1", 3, {"training": trained(0.4, 0.7, 0.8, 0.7)}, "count from 0"),
    ("02.2", 1, {"before": BEFORE, "after": AFTER}, "other way"),
    ("02.2", 3, {"before": BEFORE, "after": AFTER}, "right before"),
    ("02.3", 21.91, {"before": AFTER}, "in percent"),
    ("02.3", 0.048, {"before": AFTER}, "square root"),
    ("02.3", 0.4899, {"before": AFTER}, "divide by n"),
    ("03.1", 1.2214, {}, "The trainer is on top"),
    ("03.1", 1.2857, {}, "divides log-probs"),
    ("03.2", {"A": "stale_weight", "B": ..., "C": ...}, {}, "stale_weights"),
    ("03.2", {"A": "precision", "B": "tokenization", "C": "temperature"}, {}, "version"),
    ("03.2", {"A": "stale_weights"}, {}, "B has no cause yet"),
    ("03.3", lambda x: len(x) * ess(x), {}, "Divide by n"),
    ("03.3", lambda x: 1.0, {}, "Are the weights exp"),
    ("04.1", "3>1>6>8=8", {}, "it is right"),
    ("04.1", "3>1=2", {}, "not more than 4"),
    ("04.1", "1>" * 9, {}, "cuts at 16"),
    ("04.2", lambda s: float(s.response.endswith(s.label)), {}, "was cut"),
    ("04.2", lambda s: float("8" in s.response and s.status == "completed"), {}, "wrong place"),
    ("04.3", 3, {"rollout": SLIPPED, "reward": steps_pay}, "no right sibling"),
    ("05.1", 0.5, {}, "Dr. GRPO"),
    ("05.2", [True, True, True, False], {}, "far enough"),
    ("05.2", [False, False, True, False], {}, "come back"),
    ("05.3", without_deviation, {}, "Divide by the standard deviation"),
    ("05.3", lambda r: [x / 0 for x in r], {}, "ZeroDivisionError"),
    ("05.3", [1, 2], {}, "a function is asked for"),
    ("06.1", {"A": "healthy", "B": "healthy", "C": "healthy"}, {}, "truncated"),
    ("06.2", 4, {"reward": [0.4, 0.8, 0.5, 0.3, 0.1]}, "had fallen before"),
    ("06.3", 5, {"rows": ROWS, "groups": 16}, "Count steps"),
    ("07.1", (4, 4), {}, "made those weights"),
    ("07.1", (6, 6), {}, "counted back"),
    ("07.1", 6, {}, "two numbers"),
    ("07.2", 1e-5, {"tried": TRIED}, "so does a larger one"),
    ("07.2", 1e-3, {"tried": TRIED}, "too far"),
    ("07.2", 0.009, {"tried": TRIED}, "the KL itself"),
    ("07.2", 1e-2, {"tried": TRIED}, "was not tried"),
    ("07.3", lambda x: -sum(x) / len(x), {}, "k1"),
    ("07.3", lambda x: k3([-c for c in x]), {}, "turned around"),
    ("08.1", (1, 2, 3), {}, "very different sizes"),
    ("08.1", (0.1, 0.2, 0.3), {}, "differ in 64 bits"),
    ("08.1", (3e38, 3e38, 0), {}, "no finite 32-bit number"),
    ("08.1", 7, {}, "three numbers"),
    ("08.2", [1, 70, 256], {}, "For 1: One row cannot"),
    ("08.2", [32, 64, 256], {}, "For 70: 70 rows do not fit"),
    ("08.2", [32, 96, 288], {}, "For 256: 256 rows fill"),
    ("08.2", 96, {}, "three numbers"),
    ("08.3", lambda e, t: 3, {}, "not their share"),
    ("08.3", lambda e, t: sum({*x} == {*y} for x, y in zip(e, t, strict=True)) / 3, {}, "tokens"),
    ("08.3", lambda e, t: 1 / 6, {}, "too small"),
    ("09.1", 1024 * 4096, {}, "the weight itself"),
    ("09.1", 16 * 4096, {}, "B has 1,024 rows"),
    ("09.1", 16 * 1024 * 4096, {}, "has the weight's shape"),
    ("09.1", 3 * 81920, {}, "AdamW's two averages"),
    ("09.1", 4000, {}, "too small"),
    ("09.2", [True, True, True, True], {}, "A in the first step: think again; a change of A"),
    ("09.2", [False, False, True, True], {}, "B in the first step"),
    ("09.2", [False, True, False, True], {}, "A in the second: think again; the first step"),
    ("09.2", [False, True, ..., True], {}, "still open"),
    ("09.2", True, {}, "a list of four"),
    ("09.3", lambda w, a, b, alpha: b @ a * alpha / 3, {}, "the change alone"),
    ("09.3", lambda w, a, b, alpha: w + b @ a, {}, "Multiply B A"),
    ("09.3", lambda w, a, b, alpha: w + alpha * b @ a, {}, "Divide by r, too"),
    ("09.3", lambda w, a, b, alpha: w + alpha / 4 * b @ a, {}, "the number of A's rows"),
    ("09.3", lambda w, a, b, alpha: w + alpha / 3**0.5 * b @ a, {}, "use_rslora"),
    ("09.3", lambda w, a, b, alpha: w - alpha / 3 * b @ a, {}, "begins with 6, and yours with -4"),
    ("09.3", lambda w, a, b, alpha: a @ b, {}, "B is (out, r)"),
    ("09.3", lambda w, a, b, alpha: b, {}, "W's shape"),
    ("13.1", 0.875, {}, "The model's own token is missing"),
    ("13.1", 2.5, {}, "only if the first was right, too"),
    ("13.1", 1.5, {}, "Or: That has only the first token"),
    ("13.1", 1.125, {}, "right to the end"),
    ("13.1", 1.9375, {}, "one place too far"),
    ("13.2", [7, 2], {}, "the model's own token after them"),
    ("13.2", [7, 2, 9], {}, "drew 5 in its place"),
    ("13.2", [7, 2, 9, 4], {}, "That is the draft"),
    ("13.2", [7, 2, 5, 4], {}, "is chance"),
    ("13.2", [7, 2, 5, 4, 1], {}, "not there any more"),
    ("13.2", [7, 2, 4], {}, "4 was drawn after 9"),
    ("13.2", [5], {}, "that were right are kept"),
    ("13.2", [9], {}, "Compare from the left"),
    ("13.2", 3, {}, "a list of tokens"),
    ("13.3", lambda r, c: 20, {}, "That takes the most tokens"),
    ("13.3", best_draft(lambda r, c, k: (1 + k * r) / (1 + k * c)), {}, "if the first was right"),
    ("13.3", best_draft(lambda r, c, k: (drafted(r, k) - 1) / (1 + k * c)), {}, "is missing"),
    ("13.3", best_draft(lambda r, c, k: drafted(r, k) - k * c), {}, "takes the cost off"),
    ("13.3", best_draft(lambda r, c, k: k and drafted(r, k) / k), {}, "has its cost as well"),
    (
        "13.3",
        best_draft(lambda r, c, k: k and drafted(r, k) / (1 + k * c)),
        {},
        "one of the lengths: 0",
    ),
    ("13.3", lambda r, c: 2, {}, "For a chance of 0.8 and a cost of 0.05 it is 8; yours gives 2"),
    ("13.3", lambda r, c: 2.5, {}, "A whole number is asked for"),
    ("14.1", 4, {}, "the code alone"),
    ("14.1", 20, {}, "64 numbers share one"),
    ("14.1", 4.5, {}, "a scale of 32 bits"),
    ("14.1", 0.53125, {}, "counts bytes"),
    ("14.1", 272, {}, "Divide by its numbers"),
    ("14.2", [0, 3, -4, 7], {}, "2.5: think again; a half goes to the even"),
    ("14.2", [0, 2, -3, 7], {}, "-3 is odd"),
    ("14.2", [0, 2, 4, 7], {}, "mind its sign"),
    ("14.2", [1, 2, -4, 7], {}, "the nearest whole number is 0"),
    ("14.2", [0, 2, -4, 8], {}, "7.0: think again; the scale"),
    ("14.2", [0, 2, ..., 7], {}, "still open"),
    ("14.2", [0, "2", -4, 7], {}, "A whole number is asked for"),
    ("14.2", 7, {}, "a list of four"),
    ("14.3", lambda row, group: row, {}, "the row as it was"),
    ("14.3", lambda row, group: in_groups(row, 8), {}, "one scale for the whole row"),
    ("14.3", lambda row, group: in_groups(row, group, most=8), {}, "divides by 8"),
    ("14.3", lambda row, group: in_groups(row, group, read=False), {}, "Those are the codes"),
    ("14.3", lambda row, group: in_groups(row, group, rounds=numpy.trunc), {}, "cuts off"),
    ("14.3", lambda row, group: in_groups(row, group, size=lambda x: x), {}, "the largest size"),
    ("14.3", lambda row, group: in_groups(row, 2), {}, "becomes"),
    ("14.3", lambda row, group: row[:4], {}, "the row's shape"),
]


@pytest.mark.parametrize(("number", "answer", "known"), RIGHT)
def test_a_right_answer_is_told_so(number: str, answer: Any, known: dict[str, Any]) -> None:
    verdict = check(number, answer, **known)
    assert (verdict.state, verdict.words) == ("right", "")


@pytest.mark.parametrize(("number", "answer", "known", "words"), WRONG)
def test_a_wrong_answer_is_told_what_is_wrong(
    number: str, answer: Any, known: dict[str, Any], words: str
) -> None:
    verdict = check(number, answer, **known)
    assert verdict.state == "wrong"
    assert words in verdict.words


def test_every_exercise_has_a_wrong_answer_that_is_caught() -> None:
    assert {number for number, *_ in WRONG} == set(exercises())


STUBS = {
    "one": ...,
    "listed": [..., ...],
    "by name": {"A": ...},
    "a function": lambda _: ...,
}


@pytest.mark.parametrize("stub", STUBS.values(), ids=STUBS)
def test_a_stub_is_open_and_not_wrong(stub: object) -> None:
    assert check("03.3", stub).state == "open"
    assert "not answered yet" in str(check("03.3", stub))


def test_a_verdict_shows_its_words_escaped_and_its_sign() -> None:
    shown = check("01.1", "<script>")._repr_mimebundle_()
    assert "<script>" not in shown["text/html"]
    assert "✗ not yet" in shown["text/html"]
    assert "✗ not yet" in shown["text/plain"]


def test_an_exercise_that_does_not_exist_is_an_error_that_names_those_that_do() -> None:
    with pytest.raises(DataError, match=r"01\.1"):
        check("01.11", 1)


def test_a_cell_that_passes_other_things_is_told_how_it_should_end() -> None:
    with pytest.raises(DataError, match=r"check\('01.2', answer, rollout=rollout\)"):
        check("01.2", 1)


@pytest.mark.parametrize("lesson", LESSONS)
def test_a_lesson_ends_with_three_open_exercises_that_have_solutions(lesson: str) -> None:
    notebook = nbformat.read(NOTEBOOKS / f"{lesson}.ipynb", as_version=4)
    cells = exercise_cells(notebook)
    numbers = [f"{lesson[:2]}.{n}" for n in (1, 2, 3)]
    assert list(cells) == list(solutions(lesson)) == numbers
    for number, cell in cells.items():
        assert "..." in cell.source
        last = cell.source.splitlines()[-1]
        assert re.match(rf'check\("{number}", answer[,)]', last)


def test_there_are_eleven_lessons_of_three_exercises() -> None:
    assert len(LESSONS) == 11
    assert len(exercises()) == 33
