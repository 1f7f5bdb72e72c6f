"""Results of a run, read from the files that it left; its commit and machine."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from kit.lifecycle.resume import CONTINUED
from kit.reports import REWARD
from kit.reports.runs import Continued
from kit.tracking.run_files import RunFiles
from kit.tracking.run_folder import (
    read_rows,
    reward_curve,
)
from kit.utils.hardware import installed_gpus

SPEED = "perf/tokens_per_gpu_per_sec"
FIGURES = "figures"
CURVE = "reward_curve.png"


def headline(folder: Path | RunFiles) -> dict[str, Any]:
    """The numbers that say whether training worked; None for what the run did not measure.

    Evaluations are those of the dataset that was evaluated first: `..._before` is its first one, if
    that was made before any step, and `..._after` its last one after a step. There are accuracies
    only where all rewards were 0 or 1.
    """
    files = folder if isinstance(folder, RunFiles) else RunFiles(folder)
    rows = files.metrics()
    rewards = [row[REWARD] for row in rows if row.get(REWARD) is not None]
    speeds = [row[SPEED] for row in rows if row.get(SPEED) is not None]
    evaluations = files.evaluations()
    dataset = evaluations[0]["dataset"] if evaluations else None
    same = [row for row in evaluations if row["dataset"] == dataset]
    before = next((row for row in same if row["step"] == 0), None)
    after = next((row for row in reversed(same) if row["step"] > 0), None)
    ends = {"before": before, "after": after}
    return {
        "steps": len(rows),
        "reward_first": rewards[0] if rewards else None,
        "reward_last": rewards[-1] if rewards else None,
        "tokens_per_second": fmean(speeds) if speeds else None,
        "dataset": dataset,
        **{f"mean_reward_{when}": row and row["mean_reward"] for when, row in ends.items()},
        **{f"accuracy_{when}": row and row["accuracy"] for when, row in ends.items()},
    }


def seed(folder: Path | RunFiles) -> int | None:
    """The session's seed; None where the run started no session."""
    files = folder if isinstance(folder, RunFiles) else RunFiles(folder)
    value = files.settings().get("seed")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def git_commit(folder: Path) -> str | None:
    """The commit that the notebook's folder is at, with `-dirty` where files have changed since.

    None outside of a git repository, and where git is not installed.
    """
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None


def machine() -> dict[str, Any]:
    """The machine that this process runs on."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": installed_gpus(),
    }


def continued(folder: Path) -> list[Continued]:
    """Trainings that went on from a checkpoint."""
    return [Continued.model_validate(row) for row in read_rows(folder / CONTINUED)]


def draw_reward_curve(folder: Path) -> Path | None:
    """Draw `figures/reward_curve.png`: mean reward of every step and evaluation.

    Returns None, and draws nothing, where the run trained no step.
    """
    files = RunFiles(folder)
    rows = files.metrics()
    if not rows:
        return None
    from kit.viz import save_curve

    # Training logs its evaluations too, but not those before it and after it.
    steps = [{k: v for k, v in row.items() if not k.startswith("eval/")} for row in rows]
    marks = [
        {"step": row["step"], f"eval/{row['dataset']}": row["mean_reward"]}
        for row in files.evaluations()
    ]
    (folder / FIGURES).mkdir(exist_ok=True)
    return save_curve([*steps, *marks], folder / FIGURES / CURVE, heading=folder.name)


def text_curve(folder: Path) -> str:
    """The reward curve as text for a terminal; empty where there are fewer than two points."""
    curve = reward_curve(folder)
    if len(curve) < 2:
        return ""
    from kit.viz import terminal_curve

    return terminal_curve([reward for _, reward in curve], title="mean reward by step")
