"""A comparison of runs, made by hand."""

from __future__ import annotations

import math
import random
from pathlib import Path

from kit.reports.runs import Band, Difference, Group, RunComparison, RunInfo, Side
from kit.samples import Sample
from tests.viz.results import addition

METRICS = ("rollout/raw_reward", "eval/tiny:addition", "train/entropy_loss", "train/grad_norm")
RATES = {"1e-05": 0.02, "0.0001": 0.12, "0.003": -0.3}


def make_comparison(text: str = "", sample: Sample | None = None) -> RunComparison:
    """Three learning rates with three seeds each; with a text in every field that takes one."""
    groups = tuple(_group(rate, speed, text) for rate, speed in RATES.items())
    rates = tuple(text or rate for rate in RATES)
    return RunComparison(
        groups,
        (text, *METRICS[1:]) if text else METRICS,
        (
            Difference("parameter", text or "learning_rate", rates),
            Difference("setting", text or "training.learning_rate", rates),
            Difference("version", "torch", ("2.11.0", "2.11.0", text or "2.12.0")),
        ),
        {text or "advantage_estimator": text or "grpo", "steps": "20"},
        tuple(_row(number, sample) for number in range(4)),
        (text or "learning_rate 0.003: its runs took 6, 20, 20 steps.",),
    )


def _group(rate: str, speed: float, text: str) -> Group:
    last = max(0.0, 0.3 + 0.6 * (1 - math.exp(-20 * speed)))
    runs = tuple(
        RunInfo(
            # A folder's name cannot hold everything that a text can.
            Path("papermill_runs") / f"20260131-1425{seed:02}-02_train_to_solve-00000{seed}",
            text or "02_train_to_solve",
            text or ("completed" if speed > 0 else "stopped"),
            seconds=80.0 + seed,
            steps=20,
            reward_first=0.3,
            reward_last=last,
            mean_reward_before=0.4,
            mean_reward_after=last * 0.9,
            accuracy_before=0.4,
            accuracy_after=last * 0.9,
            seed=seed,
            sweep=text or None,
            error=text or None,
        )
        for seed in range(3)
    )
    names = (text, *METRICS[1:]) if text else METRICS
    bands = {name: _band(speed, name) for name in names}
    return Group(text or f"learning_rate {rate}", runs, bands)


def _band(speed: float, name: str) -> Band:
    steps = (0, 10, 20) if name.startswith("eval/") else tuple(range(20))
    chance = random.Random(f"{speed} {len(name)}")
    runs = [
        [max(0.0, 0.3 + 0.6 * (1 - math.exp(-speed * s)) + chance.gauss(0, 0.04)) for s in steps]
        for _ in range(3)
    ]
    columns = [*zip(*runs, strict=True)]
    mean = tuple(sum(column) / 3 for column in columns)
    return Band(steps, mean, tuple(map(min, columns)), tuple(map(max, columns)), 3, True)


def _row(number: int, sample: Sample | None) -> tuple[Side | None, ...]:
    right = sample or addition(number, 0, right=True)
    wrong = sample or addition(number, 1, right=False)
    return Side(10, wrong, 8, 0.25), Side(10, right, 8, 0.875), Side(10, wrong, 8, 0.0)
