"""What adapters cost and save on a GPU: whole sessions under a budget, and the trainer alone.

    python -m benchmarks.lora                                  # 4b and 0.6b, both ways, 24 GiB
    python -m benchmarks.lora --shapes 0.6b --ways merged,adapter,full --steps 6
    python -m benchmarks.lora --parts trainer --shapes 4b      # sequences of 16,384 tokens
    python -m benchmarks.lora --parts forks --shapes 0.6b      # four sessions on one base

Models have the shapes of Qwen3 and random weights, adapters rank 16 in all linear layers. A session
makes steps of 32 prompts x 8 responses of 512 tokens: seconds by phase (medians after two steps),
what the card held in each phase beside what the plan said, the log-prob difference, syncs, and
tokens a second of 1, 64 and 256 requests decoded at once. `4bit` is merged, with frozen weights in
4 bits; `full` trains all weights, without a budget. Each side is a process of its own, one after
the other, and the model is written by one that has ended: what it had of the card is not the
session's.

Four sessions on one base, each with an adapter of its own that has made a step, generate a quarter
of the responses each, all at once, in turns with the first one, which generates all by itself.

The trainer alone makes updates on sequences of 16,384 tokens: tokens a second, and the share of a
Hopper card's 989 TFLOP/s that forward and backward pass of all weights would take (what is frozen
needs less, what is recomputed more; neither is counted).
"""

from __future__ import annotations

import argparse
import json
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
    "sync": "perf/update_weights_time",
}
WAYS = ("merged", "adapter", "4bit", "full")
RANK = 16
PEAK = 989e12
"""Operations a second of an H100 or H200 in bfloat16, as its maker says."""
LONG = 16384
"""Tokens of the sequences that the trainer alone is measured with."""
DECODED = 256
"""Tokens of each request that is decoded among others."""


def workload(shape: str, folder: str) -> Workload:
    """The model's shape, and the batch."""
    from benchmarks.device_parts.shapes import SHAPES
    from benchmarks.gpu_parts.workload import TINY, Workload

    if shape == "tiny":
        return Workload(
            f"{folder}/tiny", "cpu", dict(TINY), 4, 4, 16, 24, requests=(1, 16), repeats=2
        )
    return Workload(f"{folder}/{shape}", shape=SHAPES[shape].config)


def settings(work: Workload, way: str, gib: float | None) -> Any:
    """The session's settings."""
    config = work.config()
    if way == "full":
        return config
    config = config.replace("model.lora", {"r": RANK, "lora_alpha": 2 * RANK})
    config = config.replace("memory.device_gib", gib)
    if way == "4bit":
        config = config.replace("model.lora.load_in_4bit", True)
    config = config.replace("engine.lora", "adapter" if way == "adapter" else "merged")
    # Where it differs by more than the default allows, what rounding does would be computed first.
    config = config.replace("mismatch.warn_above", 0.1)
    return config.replace("training.learning_rate", 1e-4)


def session(way: str, work: Workload, gib: float | None, steps: int) -> dict[str, Any]:
    """Steps, syncs and decoding of one session."""
    from benchmarks.gpu_parts.session import decoding_speed
    from benchmarks.gpu_parts.workload import reward
    from kit import RLSession

    found: dict[str, Any] = {"rows": [], "decode": {}, "gaps": [], "merge_error": []}
    with RLSession.start(settings(work, way, gib), data=work.rows(), reward=reward) as running:
        found["start"] = running.start_seconds
        say(f"started in {running.start_seconds:.0f} s\n{running.memory_plan()}")
        for number in range(steps):
            metrics = running.step().metrics
            found["rows"].append([metrics.get(name) for name in PHASES.values()])
            found["gaps"].append(metrics["train/train_rollout_logprob_abs_diff"])
            found["merge_error"].append(metrics.get("train/merge_error"))
            say(f"step {number}: {found['rows'][-1]} {found['gaps'][-1]:.2g}")
        found["plan"] = {
            phase.name: [phase.total, phase.measured, dict(phase.parts)]
            for phase in running.memory_plan().phases
        }
        found["sync"] = [running.sync().seconds for _ in range(6)]
        say(f"syncs: {found['sync']}")
        for count in work.requests:
            speed = decoding_speed(running, work, count, min(DECODED, 20 * work.length))
            found["decode"][str(count)] = speed
            say(f"{count} decoded at once: {speed:.0f} tokens/s")
        found["verified"] = running.sync(verify=True).verified
        found["mismatch"] = str(running.check_mismatch(running.generate()))
    return found


def forks(work: Workload, gib: float | None) -> dict[str, Any]:
    """Tokens a second of four sessions that generate at once, and of one that does alone."""
    from benchmarks.gpu_parts.workload import reward
    from kit import RLSession

    rows, share = work.rows(), max(work.prompts // 4, 1)
    config = settings(work, "adapter", gib).replace("training.rollout_batch_size", share)
    # Room for all responses at once, which the plan gives to those of one session otherwise.
    room = work.samples * (work.length + 8)
    config = config.replace("engine.max_total_tokens", room)
    with RLSession.start(config, data=rows, reward=reward) as first:
        say(f"started in {first.start_seconds:.0f} s")
        sessions = [first, *(first.fork(f"fork-{number}", seed=number) for number in range(1, 4))]
        for each in sessions:
            each.step()
        prompts = [row["prompt"] for row in rows[: 4 * share]]
        rates: dict[str, list[float]] = {"alone": [], "together": []}
        for _ in range(1 + work.repeats):
            for who in rates:
                for each in sessions:
                    each.sync()
                begun = time.perf_counter()
                if who == "alone":
                    rollouts = [first.generate(prompts)]
                else:
                    rollouts = RLSession.generate_together(sessions)
                seconds = time.perf_counter() - begun
                written = sum(sample.response_length for each in rollouts for sample in each)
                rates[who].append(written / seconds)
        found = {who: max(each[1:]) for who, each in rates.items()}
    return found | {"together_over_alone": found["together"] / found["alone"]}


def trainer(work: Workload, *, sequences: int = 2) -> dict[str, Any]:
    """Updates of the trainer alone on long sequences, by how much is recomputed."""
    import os
    import random

    from benchmarks.gpu_parts.floors import Samples, training_operations
    from benchmarks.gpu_parts.training import Level, forget, start
    from kit.cluster.client import kept_kernels
    from kit.config import LoraConfig
    from kit.errors import StackError
    from kit.models.source import ModelShape

    os.environ |= kept_kernels()
    import torch

    from kit.messages import TrainBatch

    draw, length = random.Random(2), LONG if work.device == "cuda" else 64
    size = work.shape["vocab_size"]
    batch = TrainBatch(
        tokens=[[draw.randrange(3, size) for _ in range(length)] for _ in range(sequences)],
        response_lengths=[length - 1] * sequences,
        loss_masks=[[1] * (length - 1)] * sequences,
        advantages=[1.0 if number % 2 else -1.0 for number in range(sequences)],
        rollout_log_probs=None,
    )
    shape = ModelShape.read(work.model)
    operations = training_operations(shape, Samples(sequences, 1, 1, length - 1))
    found: dict[str, Any] = {}
    levels: tuple[Level, ...] = ("selective", "alternating", "full", "none")
    for level in levels:
        with tempfile.TemporaryDirectory() as folder:
            made = start(
                work,
                level,
                Path(folder) / "meet",
                max_response_len=length,
                max_tokens=length,
                lora=LoraConfig(r=RANK, lora_alpha=2 * RANK),
            )
            seconds = []
            try:
                made.update(batch, f"{level} first")
                if work.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                for number in range(3):
                    begin = time.perf_counter()
                    made.update(batch, f"{level} {number}")
                    seconds.append(time.perf_counter() - begin)
                rate = sequences * length / min(seconds)
                peak = torch.cuda.max_memory_allocated() / 2**30 if work.device == "cuda" else 0.0
                found[level] = {
                    "tokens_per_second": rate,
                    "share_of_peak": operations / min(seconds) / PEAK,
                    "peak_gib": peak,
                }
                say(f"{level}: {found[level]}")
            except StackError as error:
                if "memory" not in error.what:
                    raise
                say(f"{level}: does not fit")
            del made
            forget(torch)
    return found


def say(words: str) -> None:
    """Tell on stderr what happens; stdout is for results."""
    print(words, file=sys.stderr, flush=True)


def shown(name: str, found: dict[str, Any]) -> str:
    """A side's results as lines."""
    rows = found["rows"][2:] or found["rows"]
    lines = [f"{name}: started in {found['start']:.0f} s"]
    for place, phase in enumerate(PHASES):
        values = [row[place] for row in rows if row[place] is not None]
        if values:
            lines.append(f"  {phase}: {statistics.median(values):.3f} s")
    lines.append(f"  sync, called: {statistics.median(found['sync'][1:]) * 1000:.1f} ms")
    for phase, (planned, measured, _) in found["plan"].items():
        if measured:
            lines.append(
                f"  memory, {phase}: planned {planned / 2**30:.2f} GiB, measured "
                f"{measured / 2**30:.2f} ({measured / planned - 1:+.1%})"
            )
    for count, rate in found["decode"].items():
        lines.append(f"  {count} decoded at once: {rate:.0f} tokens/s")
    lines.append(f"  mean |trainer - engine|: {max(found['gaps']):.3g} nats at most")
    errors = [error for error in found["merge_error"] if error is not None]
    if errors:
        lines.append(f"  merge error: {errors[0]:.2g} to {errors[-1]:.2g}")
    return "\n".join([*lines, *(f"  {line}" for line in found["mismatch"].splitlines()[:4])])


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="4b,0.6b", help="of 4b, 0.6b and tiny (on a CPU)")
    parser.add_argument("--ways", default="merged,adapter", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--parts", default="session,forks,trainer")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gib", type=float, default=24.0, help="the session's budget")
    parser.add_argument("--directory", help="where the models are, or are written to")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        from benchmarks.gpu_parts.card import make_model

        what, shape = asked.one
        work = workload(shape, asked.directory)
        if what == "model":
            make_model(work)
            return
        gib = asked.gib if work.device == "cuda" else None
        if what == "trainer":
            found = trainer(work)
        elif what == "forks":
            found = forks(work, gib)
        else:
            found = session(what, work, gib, asked.steps)
        print(json.dumps(found), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        sides = [way for way in WAYS if way in asked.ways.split(",")]
        sides = sides if "session" in asked.parts else []
        sides += [part for part in ("forks", "trainer") if part in asked.parts]
        for shape in asked.shapes.split(","):
            directory = asked.directory or folder
            there = (Path(workload(shape, directory).model) / "config.json").exists()
            for side in sides if there else ["model", *sides]:
                command = [sys.executable, "-m", __spec__.name, "--one", side, shape]
                command += ["--steps", str(asked.steps), "--gib", str(asked.gib)]
                command += ["--directory", directory]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    print(f"{shape}, {side}: failed", flush=True)
                    continue
                if side == "model":
                    continue
                found = json.loads(done.stdout.splitlines()[-1])
                name = f"{shape}, {side}"
                text = shown(name, found) if side in WAYS else f"{name}: {found}"
                print(text, flush=True)


if __name__ == "__main__":
    main()
