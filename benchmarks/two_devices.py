"""Two devices: two trainers and two engines colocated, or one of each apart, beside one device.

    python -m benchmarks.two_devices                  # two GPUs: tiny, then Qwen3-0.6B's shape
    python -m benchmarks.two_devices --device-gib 24  # as if each card were a small one
    python -m benchmarks.two_devices --device cpu     # two ranks and two engines on CPU cores
    python -m benchmarks.two_devices --json results.json --steps 3

Every way starts from the same seed. The responses of a first step are written by one device and
trained on by all: the metrics of that update are compared. Then each way makes steps of its own,
whose times, mismatch, memory and syncs are printed. It exits with 1 where metrics differ by more
than the dtype explains, or trainer and engine disagree.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.card import TOKENIZER_FILES
from benchmarks.gpu_parts.workload import QWEN3_06B
from kit import RLSession, SessionConfig
from kit.models.source import TINY_DIRECTORY
from kit.samples import Batch, Rollout
from kit.utils.hardware import gpu_count

COMPARED = ("train/loss", "train/grad_norm", "train/entropy_loss", "train/ppo_kl")
TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
"""Relative, of the first update's metrics."""
GIB = 1 << 30


@dataclass(frozen=True)
class Way:
    """Who has which device."""

    name: str
    trainers: int
    engines: int
    colocate: bool
    tensor_parallel: int = 1
    data_parallel: int = 1


WAYS = (
    Way("one device", 1, 1, True),
    Way("colocated: 2 trainers, 2 engines", 2, 2, True),
    Way("disaggregated: 1 trainer, 1 engine", 1, 1, False),
)
GPU_WAYS = (
    Way("colocated: 2 trainers, an engine of 2", 2, 1, True, 2),
    Way("the same with data_parallel: 2", 2, 1, True, 2, 2),
)
"""An engine of two ranks needs NCCL."""


def main() -> int:
    """Run it all; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--models", default="", help="tiny, qwen3-0.6b, or both with a comma")
    parser.add_argument("--ways", default="", help="only those whose name has this in it")
    parser.add_argument("--steps", type=int, default=3, help="of each way, after the first update")
    parser.add_argument("--device-gib", type=float, help="plan for cards of this size")
    parser.add_argument("--json", type=Path, help="write the figures into this file")
    asked = parser.parse_args()
    gpu = asked.device != "cpu" and gpu_count() > 0
    if gpu and gpu_count() < 2:
        print(f"Two GPUs are needed, and there is {gpu_count()}. Try --device cpu.")
        return 2
    models = asked.models.split(",") if asked.models else ["tiny", *(["qwen3-0.6b"] if gpu else [])]
    rows: list[dict[str, Any]] = []
    for model in models:
        batch: Batch | None = None
        for way in WAYS + GPU_WAYS * gpu:
            if asked.ways not in way.name:
                continue
            config = configuration(model, way, "cuda" if gpu else "cpu", asked.device_gib)
            row, batch = measure(model, way, config, asked.steps, batch)
            rows.append(row)
            print(json.dumps(row, indent=2), flush=True)
            if asked.json:
                asked.json.write_text(json.dumps(rows, indent=2))
    wrong = compare(rows)
    print("\n".join(table(rows) + (wrong or ["All ways learn the same, within the dtype."])))
    return int(bool(wrong))


def configuration(model: str, way: Way, device: str, gib: float | None) -> SessionConfig:
    """The same for all ways, but for the devices."""
    config = SessionConfig.preset("tiny")
    if model == "qwen3-0.6b":
        folder = Path(tempfile.gettempdir()) / "kit-two-devices-qwen3-0.6b"
        if not (folder / "config.json").exists():
            write_shape(folder)
        config = config.replace("model.name", str(folder))
        config = config.replace("training.learning_rate", 1e-6)
        config = config.replace("rollout.max_response_len", 256)
    for key, value in {
        "device": device,
        "training.num_trainers": way.trainers,
        "memory.device_gib": gib,
        "engine.replicas": way.engines,
        "engine.tensor_parallel": way.tensor_parallel,
        "engine.data_parallel": way.data_parallel,
        "cluster.colocate": way.colocate,
    }.items():
        config = config.replace(key, value)
    return config


def write_shape(folder: Path) -> None:
    """Weights of chance in Qwen3-0.6B's shape, with the tokenizer of the embedded model."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    shape = Qwen3Config(**QWEN3_06B, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    Qwen3ForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_DIRECTORY / name, folder)


def measure(
    model: str, way: Way, config: SessionConfig, steps: int, batch: Batch | None
) -> tuple[dict[str, Any], Batch]:
    """One session: the first update on the batch that all share, then steps of its own."""
    begin = time.perf_counter()

    def say(what: str) -> None:
        print(f"[{time.perf_counter() - begin:5.1f} s] {model}, {way.name}: {what}", flush=True)

    with RLSession.start(config) as session:
        started = time.perf_counter() - begin
        say("started")
        if batch is None:
            batch = session.advantages(spread(session.score(session.generate())))
        first = session.update(batch)
        say("updated")
        sync = session.sync(verify=True)
        say("synced")
        mismatch = session.check_mismatch(session.generate())
        reports = [session.step() for _ in range(steps)]
        row = {
            "model": model,
            "way": way.name,
            "devices": session.debug.stack.layout.in_words(),
            "dtype": session.debug.stack.dtype,
            "start_s": round(started, 2),
            "first_update": {name: first.metrics[name] for name in COMPARED},
            "step_s": [round(r.metrics["perf/step_time"], 4) for r in reports],
            "update_s": [round(r.metrics["perf/actor_train_time"], 4) for r in reports],
            "sync_s": [round(r.metrics["perf/update_weights_time"], 4) for r in reports],
            "first_sync_s": round(sync.seconds, 4),
            "parameters_verified": sync.verified,
            "mismatch": {"verdict": mismatch.verdict, "mean_abs_diff": mismatch.mean_abs_diff},
            "rewards": [r.metrics["rollout/raw_reward"] for r in reports],
            "gib": memory(session),
        }
    return row, batch


def spread(rollout: Rollout) -> Rollout:
    """Where all rewards are equal nothing would be learned: count a response's even tokens then."""
    if len({s.reward for s in rollout}) > 1:
        return rollout
    even = (sum(token % 2 == 0 for token in sample.response_tokens) for sample in rollout)
    rewarded = zip(rollout, even, strict=True)
    return rollout.with_samples(sample.with_reward(float(count)) for sample, count in rewarded)


def memory(session: RLSession) -> dict[str, list[float]]:
    """GiB: what each trainer's process sees used of its own card; the plan's three phases."""
    stack = session.debug.stack
    seen = [look.get("used", 0) / GIB for look in stack.trainers.ask("device_memory")]
    planned = [phase.total / GIB for phase in session.memory_plan().phases]
    peaks = [size / GIB for size in stack.trainers.measured.values()]
    return {
        "used_by_card": [round(x, 2) for x in seen],
        "peak_by_phase": [round(x, 2) for x in peaks],
        "planned_by_phase": [round(x, 2) for x in planned],
    }


def compare(rows: list[dict[str, Any]]) -> list[str]:
    """What differs from one device more than it may."""
    wrong = []
    for row in rows:
        one = next(r for r in rows if r["model"] == row["model"])
        for name, value in row["first_update"].items():
            expected = one["first_update"][name]
            if not math.isclose(value, expected, rel_tol=TOLERANCE[row["dtype"]], abs_tol=1e-4):
                wrong.append(f"{row['model']}, {row['way']}: {name} is {value}, not {expected}.")
        if row["mismatch"]["verdict"] == "fail":
            wrong.append(f"{row['model']}, {row['way']}: trainer and engine disagree.")
    return wrong


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One line a session."""
    lines = ["model        way                                  step s  update s  sync s  mismatch"]
    for row in rows:
        last = [row[key][-1] if row[key] else math.nan for key in ("step_s", "update_s", "sync_s")]
        lines.append(
            f"{row['model']:<12} {row['way']:<36} {last[0]:6.2f}  {last[1]:8.3f}  {last[2]:6.3f}  "
            f"{row['mismatch']['mean_abs_diff']:.2g} ({row['mismatch']['verdict']})"
        )
    return lines


if __name__ == "__main__":
    raise SystemExit(main())
