"""Tasks of the tiny model: questions with answers that a program can check.

    addition   prompt "37+45="           label "82"   a right response is exactly "82"
    chain      prompt "(3+8+5+2)%10="    label "8"    a right response ends in 8: "3>1>6>8=8"

`addition` is about one habit: carrying. `chain` is about length: the tiny network cannot add four
to six digits in one look, so a response that jumps to "=8" is a guess, and a response that writes
the running sums (modulo ten) first is nearly always right. No reward looks at the chain itself.

Rows are the same on every machine and Python version: membership and order come from SHA-256, not
from a random generator. Held-out questions are never seen, neither by the corpus that made the
weights (`kit.tiny.recipe`) nor by the rows of the train split; for `addition` the mirror image of
a held-out question (45+37 for 37+45) is held out with it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from kit.errors import DataError

Row = dict[str, Any]
"""`prompt` (plain user text), `label` (text), `metadata` (task, split and what the task knows)."""

SPLITS = ("train", "held_out")

OPERANDS = tuple(n for n in range(11, 100) if n % 10)
"""Two-digit numbers that do not end in 0: no carry can come from those, so they teach nothing."""

CHAIN_LENGTHS = (4, 5, 6)
CHAIN_ROWS = {"train": 4000, "held_out": 500}

_HELD_OUT_PERCENT = 10


@dataclass(frozen=True, slots=True)
class Task:
    """One task: its name, its reward, and the length that a response needs."""

    name: str
    description: str
    reward: str
    """Name of the built-in reward (`kit.rewards.grade`) that grades a response against `label`."""
    max_response_tokens: int
    """Longest sensible response with its `<|end|>`, plus a little room to go wrong in."""


TASKS: dict[str, Task] = {
    "addition": Task(
        name="addition",
        description="add two two-digit numbers; the base model mostly forgets to carry",
        reward="exact",
        max_response_tokens=8,
    ),
    "chain": Task(
        name="chain",
        description="last digit of a sum of 4 to 6 digits; right only if the steps are written",
        reward="number",
        max_response_tokens=16,
    ),
}


def rows(task: str, split: str) -> list[Row]:
    """All rows of one split, in a fixed shuffled order.

    `addition` has 6,561 questions, about a tenth of them held out. `chain` has 590,490 possible
    questions; a fixed sample of `CHAIN_ROWS` is returned. Each call returns fresh objects.

    Raises DataError for a task or a split that does not exist.
    """
    if task not in TASKS:
        raise DataError(
            f"There is no tiny task named {task!r}.",
            why="The tiny model was trained for a fixed list of tasks.",
            fix=f"Use one of: {', '.join(TASKS)}.",
        )
    if split not in SPLITS:
        raise DataError(
            f"Task {task!r} has no split named {split!r}.",
            why="Questions are either trained on or kept apart to measure with.",
            fix=f"Use one of: {', '.join(SPLITS)}.",
        )
    return _ROWS[task](split)


def is_held_out(task: str, operands: Sequence[int]) -> bool:
    """Whether a question is kept out of every training set.

    The order of `operands` is ignored for `addition`, where 37+45 and 45+37 are one fact.
    """
    key = sorted(operands) if task == "addition" else operands
    return _hash(task, "split", *key) % 100 < _HELD_OUT_PERCENT


def needs_carry(a: int, b: int) -> bool:
    """Whether the ones digits of `a` and `b` add up to ten or more."""
    return a % 10 + b % 10 >= 10


def addition_prompt(a: int, b: int) -> str:
    """Prompt of an addition: 37, 45 -> "37+45="."""
    return f"{a}+{b}="


def chain_prompt(digits: Sequence[int]) -> str:
    """Prompt of a chain: [3, 8, 5, 2] -> "(3+8+5+2)%10="."""
    return f"({'+'.join(map(str, digits))})%10="


def running_sums(digits: Sequence[int]) -> list[int]:
    """Running sums modulo ten, the steps of a chain: [3, 8, 5, 2] -> [3, 1, 6, 8]."""
    sums, total = [], 0
    for digit in digits:
        total = (total + digit) % 10
        sums.append(total)
    return sums


def chain_response(sums: Sequence[int]) -> str:
    """A chain's steps as a response: [3, 1, 6, 8] -> "3>1>6>8=8"."""
    return f"{'>'.join(map(str, sums))}={sums[-1]}"


def _addition_rows(split: str) -> list[Row]:
    pairs = [
        (a, b)
        for a in OPERANDS
        for b in OPERANDS
        if is_held_out("addition", (a, b)) == (split == "held_out")
    ]
    pairs.sort(key=lambda pair: _hash("addition", "order", *pair))
    return [
        {
            "prompt": addition_prompt(a, b),
            "label": str(a + b),
            "metadata": {
                "task": "addition",
                "split": split,
                "a": a,
                "b": b,
                "carry": needs_carry(a, b),
            },
        }
        for a, b in pairs
    ]


def _chain_rows(split: str) -> list[Row]:
    wanted = (d for d in _chain_questions() if is_held_out("chain", d) == (split == "held_out"))
    result = []
    for digits in islice(wanted, CHAIN_ROWS[split]):
        sums = running_sums(digits)
        result.append(
            {
                "prompt": chain_prompt(digits),
                "label": str(sums[-1]),
                "metadata": {
                    "task": "chain",
                    "split": split,
                    "digits": list(digits),
                    "steps": chain_response(sums),
                },
            }
        )
    return result


def _chain_questions() -> Iterator[tuple[int, ...]]:
    """Every question at most once, in a fixed endless-looking order, lengths in turn."""
    seen: set[tuple[int, ...]] = set()
    index = 0
    while True:
        length = CHAIN_LENGTHS[index % len(CHAIN_LENGTHS)]
        number = _hash("chain", "question", index)
        digits = tuple(number // 9**place % 9 + 1 for place in range(length))
        index += 1
        if digits not in seen:
            seen.add(digits)
            yield digits


def _hash(*parts: object) -> int:
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


_ROWS: dict[str, Callable[[str], list[Row]]] = {"addition": _addition_rows, "chain": _chain_rows}
