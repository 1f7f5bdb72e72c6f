"""What `training.true_on_policy` costs on this machine: the embedded model, or on a GPU 0.6 B.

    python -m benchmarks.true_on_policy                 # CPU, float32, 16 prompts x 8
    python -m benchmarks.true_on_policy --dtype bfloat16 --steps 12
    python -m benchmarks.true_on_policy --gpu           # Qwen3-0.6B's shape, bfloat16, 32 x 8 x 512
    python -m benchmarks.true_on_policy --gpu --mixture --sides exact,replay,plain

On a CPU two sessions run side by side, one with and one without, and make their steps in turns, so
that what else the machine does hits both. On a GPU they run one after the other, `--steps` with and
a quarter of them without, and decode a number of requests at a time. The ratios are of the medians
after the first two steps; the log-probs of trainer and engine are compared at every step.

`--mixture` takes a mixture of experts of 1.2 B parameters and 256 tokens a response, and `replay`
the trainer that follows the engine's experts (`training.use_rollout_routing_replay`). Weights are
random; the mixture's last norm is six times as large, so that its distributions have peaks.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu_parts.workload import Workload

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


DECODED = 256
"""Tokens of each request that is decoded among others."""


SIDES: dict[str, dict[str, Any]] = {
    "exact": {"true_on_policy": True},
    "replay": {"use_rollout_routing_replay": True},
    "plain": {},
}
"""What `training` has on each side."""


def workload(directory: str, *, mixture: bool) -> Workload:
    """What runs on a GPU."""
    from benchmarks.gpu_parts.workload import MIXTURE, Workload

    if not mixture:
        return Workload(directory)
    return Workload(directory, shape=dict(MIXTURE), response_tokens=256)


def on_gpu(side: str, steps: int, work: Workload) -> None:
    """Run one side on a GPU; print what was measured as JSON, last."""
    from benchmarks.gpu_parts.card import device_memory, make_model
    from benchmarks.gpu_parts.session import stack_of
    from benchmarks.gpu_parts.workload import reward
    from kit import RLSession
    from kit.messages import SamplingSettings

    if not (Path(work.model) / "config.json").exists():
        make_model(work)
    config = work.config()
    for name, value in SIDES[side].items():
        config = config.replace(f"training.{name}", value)
    found: dict[str, Any] = {"rows": [], "decode": {}}
    with RLSession.start(config, data=work.rows(), reward=reward) as session:
        found["start"] = session.start_seconds
        for number in range(steps):
            metrics = session.step().metrics
            gap = metrics["train/train_rollout_logprob_abs_diff"]
            found["rows"].append([*(metrics[name] for name in PHASES.values()), gap])
            print(f"step {number}: {found['rows'][-1]}", file=sys.stderr, flush=True)
        found["memory"] = device_memory()
        stack, sampling = stack_of(session), SamplingSettings(1.0, DECODED)
        for count in work.requests:
            best = float("inf")
            for _ in range(3):
                session.sync()
                begun = time.perf_counter()
                for _part in stack.generate(work.token_rows(count), sampling, list(range(count))):
                    pass
                best = min(best, time.perf_counter() - begun)
            found["decode"][str(count)] = count * DECODED / best
    print(json.dumps(found), flush=True)


def compare_on_gpu(asked: argparse.Namespace) -> None:
    """Sides one after the other, and their ratios."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.sides:
            steps = asked.steps if name == "exact" else max(4, asked.steps // 4)
            command = [sys.executable, "-m", __spec__.name, "--gpu", "--serve", name]
            command += ["--steps", str(steps), "--directory", asked.directory or folder]
            command += ["--mixture"] * asked.mixture
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            rows = found[name]["rows"]
            median = {
                phase: statistics.median(row[place] for row in rows[2:])
                for place, phase in enumerate(PHASES)
            }
            found[name] |= median
            memory = (found[name]["memory"] or 0) / 2**30
            print(
                f"{name}: {steps} steps, started in {found[name]['start']:.0f} s,",
                *(f"{phase} {seconds:.3f} s," for phase, seconds in median.items()),
                *(f"{n} at once {rate:.0f} tokens/s," for n, rate in found[name]["decode"].items()),
                f"{memory:.1f} GiB of the card,",
                f"mean |trainer - engine| at most {max(row[-1] for row in rows):.3g} nats",
                flush=True,
            )
    plain = found.pop("plain", None)
    for name, side in found.items() if plain else ():
        for phase in PHASES:
            print(f"{name}, {phase}: {plain[phase] / side[phase]:.2f} of the speed without")
        for count, rate in side["decode"].items():
            share = rate / plain["decode"][count]
            print(f"{name}, {count} decoded at once: {share:.2f} of the speed without")


def main() -> None:
    """Measure, and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=None, help="16 on a CPU, 20 on a GPU")
    parser.add_argument("--gpu", action="store_true", help="the 0.6 B shape on a GPU")
    parser.add_argument("--mixture", action="store_true", help="on a GPU: a mixture of experts")
    parser.add_argument(
        "--sides",
        default=["exact", "plain"],
        type=lambda text: [name for name in SIDES if name in text.split(",")],
        help=f"on a GPU: which to run, of {', '.join(SIDES)}",
    )
    parser.add_argument("--directory", help="on a GPU: where the model is, or is written to")
    parser.add_argument("--serve", choices=[*SIDES], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.steps = asked.steps or (20 if asked.gpu else 16)
    if asked.gpu and asked.serve:
        on_gpu(asked.serve, asked.steps, workload(asked.directory, mixture=asked.mixture))
        return
    if asked.gpu:
        compare_on_gpu(asked)
        return
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
