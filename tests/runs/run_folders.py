"""Folders of runs, written by hand as `kit run` leaves them."""

from __future__ import annotations

import json
import math
import random
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import yaml

from kit.config import SessionConfig
from kit.samples import Sample, Status

STARTED = datetime(2026, 1, 31, 14, 25, 1).astimezone()
VERSIONS = {"python": "3.11.9", "kit": "0.1.0", "torch": "2.11.0"}


def make_run(
    root: Path,
    number: int,
    lr: float = 1e-4,
    seed: int = 0,
    *,
    steps: int = 12,
    status: str = "completed",
    sampled: bool = True,
    hostile: str = "",
    **result: Any,
) -> Path:
    """A run of `lesson.ipynb`, started `number` minutes after the first."""
    at = STARTED + timedelta(minutes=number)
    folder = root / f"{at:%Y%m%d-%H%M%S}-lesson-{number:06x}"
    folder.mkdir(parents=True)
    parameters = {"lr": lr, "steps": steps, "seed": seed, "note": hostile or "none"}
    config = SessionConfig.preset("tiny").replace("seed", seed)
    config = config.replace("training.learning_rate", lr)
    (folder / "params.yaml").write_text(yaml.safe_dump(parameters))
    (folder / "config.yaml").write_text(config.to_yaml())
    rewards = [_reward(step, lr, seed) for step in range(steps)]
    _lines(folder / "metrics.jsonl", [_metrics(step, r) for step, r in enumerate(rewards)])
    if sampled:
        rows = [row for step in range(0, steps, 5) for row in _samples(step, lr, hostile)]
        _lines(folder / "samples.jsonl", rows)
    evaluations = [(0, 0.4), (steps, 0.4 + rewards[-1] / 2)] if steps else []
    _lines(
        folder / "evaluations.jsonl",
        [
            {"dataset": "tiny:addition", "step": s, "mean_reward": a, "accuracy": a}
            for s, a in evaluations
        ],
    )
    record = {
        "status": status,
        "notebook": "notebooks/lesson.ipynb",
        "parameters": parameters,
        "versions": VERSIONS,
        "git_commit": "c" * 40,
        "seed": seed,
        "started": at.isoformat(),
        "seconds": 60.0 + number,
        "error": None,
    }
    (folder / "result.json").write_text(json.dumps(record | result))
    return folder


def _reward(step: int, lr: float, seed: int) -> float:
    speed = {1e-5: 0.02, 1e-4: 0.12}.get(lr, 0.3)
    noise = random.Random(f"{seed} {step}").gauss(0, 0.03)
    return max(0.0, 0.3 + 0.6 * (1 - math.exp(-speed * step)) + noise)


def _metrics(step: int, reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "rollout/raw_reward": reward,
        "rollout/response_len/mean": 4 - reward,
        "train/entropy_loss": 1 - reward,
        "train/grad_norm": 0.5 + reward / 3,
        "perf/step_time": 0.5,
        "train/tis": None,
    }


def _samples(step: int, lr: float, hostile: str) -> list[dict[str, Any]]:
    rows = []
    for group in range(4):
        for index in range(2):
            a, b = 12 + 7 * group + step, 30 + group
            right = index == 0 or lr > 1e-5
            response = f"{a + b if right else a + b + 1}{hostile}"
            sample = Sample(
                group_index=group,
                index=2 * group + index,
                prompt=f"{a}+{b}=",
                tokens=[*range(5), *range(3)],
                response=response,
                response_length=3,
                label=str(a + b),
                reward=float(right),
                status=Status.COMPLETED,
            )
            rows.append({"step": step, **sample.to_dict()})
    return rows


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
