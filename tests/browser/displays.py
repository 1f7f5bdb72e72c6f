"""Every display of the kit, once: the one list that all tests in a browser go through.

A new display is one more line in `DISPLAYS`: its name, and how to make one without a session. (The
pictures of `docs/screenshots` are of a real run, see `docs/make_screenshots.py`.) What it does with
hostile text is in `poisoned` of `tests/viz/test_hostile_text.py`, which the browser is shown too.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import kit
from kit.config import SessionConfig
from kit.diagnostics.reward_trial import try_reward
from kit.reports import RewardTrial, SyncReport
from kit.samples import Rollout, Sample, Status
from kit.viz import compare_samples, curves
from tests.viz.comparisons import make_comparison
from tests.viz.results import (
    make_batch,
    make_check,
    make_diagnosis,
    make_evaluation,
    make_host_plan,
    make_memory_plan,
    make_mismatch,
    make_rollout,
    make_run,
    make_sessions,
    make_state,
    make_status,
    make_step,
    make_update,
)
from tests.viz.what_ifs import make_snapshots, make_what_if


def chat() -> Sample:
    """A chat, cut at its limit, with a tool's words in it that were not trained on."""
    pieces = ["17", " +", " 25", " is", " <tool>", "42", "</tool>", ", so", " 42", "."]
    chances = [0.98, 0.95, 0.93, 0.6, 0.3, 0.9, 0.9, 0.04, 0.99, 0.006]
    return Sample(
        group_index=4,
        index=33,
        prompt=[
            {"role": "system", "content": "You add numbers. Answer with the sum."},
            {"role": "user", "content": "What is 17 + 25?"},
        ],
        tokens=[*range(100, 112), *range(200, 210)],
        response="".join(pieces),
        response_length=10,
        label="42",
        reward=1.0,
        status=Status.TRUNCATED,
        loss_mask=[1, 1, 1, 1, 1, 0, 0, 1, 1, 1],
        metadata={"token_texts": pieces},
        rollout_log_probs=[math.log(chance) for chance in chances],
        weight_versions=[7],
    )


def progress() -> Any:
    """The line that moves while training runs, after its last step."""
    from kit.utils.display import Picture
    from kit.viz.live.progress import Progress

    line = Progress(40, enabled=False)
    for step in range(25):
        line.update(make_step(step))
    line.line = "step 25/40   reward 0.741   length 3.0   2.80 s a step   42 s left"
    data = line.picture()
    return Picture(data["text/html"], data["text/plain"])


def starting() -> Any:
    """The line that tells what a session does while it starts."""
    from kit.cluster.progress import Stage
    from kit.utils.display import Picture
    from kit.viz.live.progress import shown, under_way

    found = {
        "engine": Stage("loading weights, capturing graphs", 18.0),
        "trainer": Stage("compiling layers (kept for the next start)", 13.0),
    }
    data = shown(under_way(0.0, found, 41.0, ray=True))
    return Picture(data["text/html"], data["text/plain"])


def rollout_with_failures() -> Any:
    """Groups of six kinds of samples."""
    rollout = make_rollout(groups=3, size=4)
    odd = {
        1: {"status": Status.TRUNCATED, "response": "12 and 30 and 12 and " * 30},
        2: {"status": Status.FAILED, "reward": None, "error": "ValueError: no number in 'twelve'"},
        5: {"status": Status.ABORTED, "response": ""},
        8: {"response": "Sixty-three.\n\nOr, in digits:\n63"},
    }
    return rollout.with_samples(
        [replace(s, **odd.get(s.index, {})) for s in rollout]  # type: ignore[arg-type]
    )


def annotated(rollout: Rollout, before: bool = False) -> Rollout:
    """The samples with what the trainer says of each token, after an update or before it."""
    chance = random.Random(5)

    def known(sample: Sample) -> Sample:
        moved = [chance.gauss(0.1, 0.4) for _ in sample.rollout_log_probs or ()]
        old = [x + chance.gauss(0, 0.01) for x in sample.rollout_log_probs or ()]
        new = [min(x + by, -1e-4) for x, by in zip(old, moved, strict=True)]
        values = {"trainer_log_prob": old if before else new}
        values["entropy"] = [chance.uniform(0.01, 1.4) for _ in old]
        if not before:
            values["trainer_log_prob_before"] = old
        versions = [3] if before else [3, 4]
        return replace(sample, token_values=values, annotated_versions=versions)

    return rollout.with_samples(known(sample) for sample in rollout)


def trial() -> RewardTrial:
    """A reward for the right last digit, beside the exact one; it fails on some samples."""

    def last_digit(sample: Sample) -> float:
        if sample.index % 17 == 3:
            raise ValueError(f"no digit in {sample.response!r}")
        return float(sample.response[-1:] == str(sample.label)[-1:])

    return try_reward(make_rollout(), last_digit, "exact")


DISPLAYS: dict[str, Callable[[], Any]] = {
    "sample": lambda: make_rollout()[1],
    "sample-chat": chat,
    "rollout": make_rollout,
    "rollout-odd": rollout_with_failures,
    "batch": make_batch,
    "update": lambda: make_update(per_step=(make_update().metrics,) * 2),
    "sync": lambda: SyncReport(weight_version=4, seconds=0.055, tensors=310, bytes=1_192_000_000),
    "mismatch": make_mismatch,
    "mismatch-pass": lambda: make_mismatch(
        verdict="pass", cause="", cause_kind="none", evidence=(), worst=(), mean_abs_diff=2.1e-6
    ),
    "check": make_check,
    "evaluation": lambda: make_evaluation(size=4),
    "step": lambda: make_step(evaluated=True),
    "training": make_run,
    "training-stopped": lambda: replace(make_run(12), stopped="interrupted in step 12"),
    "settings": lambda: SessionConfig.preset("tiny"),
    "curves": lambda: curves(make_run()),
    "comparison": lambda: compare_samples(make_rollout(right=0.3), make_rollout(right=0.8)),
    "progress": progress,
    "strip-entropy": lambda: annotated(Rollout([chat()]))[0].strip("entropy"),
    "strip-change": lambda: annotated(Rollout([chat()]))[0].strip("change"),
    "moved": lambda: kit.compare(
        annotated(make_rollout(groups=4), before=True), annotated(make_rollout(groups=4))
    ),
    "session": lambda: make_state(
        step=8,
        weight_version=8,
        engine_version=8,
        host_memory=2_300_000_000,
        rewards=(0.42, 0.48, 0.55, 0.53, 0.64, 0.7, 0.69, 0.78),
        last_reward=0.78,
    ),
    "reward-trial": trial,
    "dashboard": make_status,
    "diagnosis": make_diagnosis,
    "sessions": make_sessions,
    "starting": starting,
    "memory": lambda: make_memory_plan().with_measured(
        {"generate": 23_400_000_000, "update": 23_900_000_000, "sync": 10_700_000_000}
    ),
    "memory-cpu": make_host_plan,
    "snapshots": make_snapshots,
    "what-if": make_what_if,
    "runs-compared": make_comparison,
    # ---- Add new displays above this line: "name": how to make one. ----
}


@cache
def bundle(name: str) -> dict[str, str]:
    """What a notebook stores of a display."""
    shown: dict[str, str] = DISPLAYS[name]()._repr_mimebundle_()
    return shown
