"""What `training.true_on_policy` costs on this machine's CPU, with the embedded model.

    python -m benchmarks.true_on_policy                 # float32, 16 prompts x 8
    python -m benchmarks.true_on_policy --dtype bfloat16 --steps 12 --rounds 3

Two sessions run side by side, one with and one without, and make their steps in turns, so that what
else the machine does hits both. The ratios are of the same steps' medians; the log-probs of the one
are compared at every step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from typing import Any

PHASES = {
    "step": "perf/step_time",
    "generate": "perf/rollout_time",
    "update": "perf/actor_train_time",
}


def serve(exact: bool, dtype: str) -> None:
    """Make a step for each line that is read; print its times and its largest difference."""
    from kit import RLSession, SessionConfig

    config = SessionConfig.preset("tiny").replace("training.true_on_policy", exact)
    config = config.replace("model.dtype", dtype).replace("name", f"exact-{exact}".lower())
    with RLSession.start(config) as session:
        print("ready", flush=True)
        for _ in sys.stdin:
            metrics = session.step().metrics
            gap = metrics["train/train_rollout_logprob_abs_diff"]
            print(*(metrics[name] for name in PHASES.values()), gap, flush=True)


def main() -> None:
    """Measure, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--serve", choices=["exact", "plain"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.serve == "exact", asked.dtype)
        return
    sides: dict[str, Any] = {}
    times: dict[str, list[list[float]]] = {"plain": [], "exact": []}
    for name in times:
        command = [sys.executable, "-m", __spec__.name, "--dtype", asked.dtype, "--serve", name]
        sides[name] = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ
        )
        while sides[name].stdout.readline() != "ready\n":
            pass
    for _ in range(asked.steps + 2):
        for name, side in sides.items():
            side.stdin.write("\n")
            side.stdin.flush()
            times[name].append([float(x) for x in side.stdout.readline().split()])
    for side in sides.values():
        side.communicate("")
    print(f"{asked.dtype}, {asked.steps} steps each, in turns, on {os.cpu_count()} cores")
    for place, phase in enumerate(PHASES):
        plain, exact = (
            statistics.median(row[place] for row in times[name][2:]) for name in ("plain", "exact")
        )
        print(f"{phase:9} {plain:.3f} s plain, {exact:.3f} s true_on_policy: {exact / plain:.2f}x")
    for name, rows in times.items():
        print(f"{name}: mean |trainer - engine| at most {max(row[-1] for row in rows):.3g} nats")


if __name__ == "__main__":
    main()
