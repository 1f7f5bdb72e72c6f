"""The same iteration in TRL: GRPOTrainer with Transformers' generation, on the same card."""

from __future__ import annotations

import multiprocessing
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.gpu_parts.children import Report
from benchmarks.gpu_parts.workload import Workload
from benchmarks.trl_side import Iteration, serve


def measure(_: None, work: Workload, report: Report) -> None:
    """`iterations`: (seconds, of them generating), after a first one.

    The micro-batch is the largest that fits of an eighth of the batch, half of that, and so on.
    """
    if find_spec("trl") is None:
        raise RuntimeError("TRL is not installed: uv pip install --group bench")
    size = max(1, work.samples // 8)
    while not _iterations(work, report, size):
        if size == 1 or report.left() < 60:
            raise RuntimeError("no micro-batch was small enough, or there was no time to find one")
        size //= 2
        report.say(f"once more with micro-batches of {size}")


def _iterations(work: Workload, report: Report, size: int) -> bool:
    """Were all iterations measured, with micro-batches of so many samples?"""
    ours, theirs = multiprocessing.Pipe()
    steps = 1 + work.trl_steps
    child = multiprocessing.get_context("spawn").Process(
        target=serve,
        args=(theirs, work.config(), work.rows(), True, steps + 1, _changes(work, size)),
    )
    child.start()
    theirs.close()
    report.put("micro_batch", size)
    found = []
    try:
        _ready(ours, report)
        report.say("ready")
        for number in range(steps):
            ours.send("step")
            done: Iteration = _receive(ours, report)
            if done.tokens != work.samples * work.response_tokens:
                raise ValueError(f"TRL wrote {done.tokens} tokens, not what was asked for")
            report.say(f"iteration {number}: {done.seconds:.2f} s")
            values = (done.seconds, done.generate_seconds)
            if number:
                found.append(values)
                report.put("iterations", found)
            else:
                report.put("first", values)
        return True
    except EOFError:
        return bool(found)
    finally:
        child.kill()
        child.join()


def _ready(channel: Connection, report: Report) -> None:
    try:
        _receive(channel, report)
    except EOFError:
        raise RuntimeError("TRL did not start; what it said is above") from None


def _receive(channel: Connection, report: Report) -> Any:
    if not channel.poll(max(0.0, report.left())):
        raise TimeoutError("the time limit came first")
    return channel.recv()


def _changes(work: Workload, size: int) -> dict[str, Any]:
    """What TRL is told beside what both sides have in common."""
    steps = work.samples // size
    on_gpu = work.device == "cuda"
    return {
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": steps,
        "steps_per_generation": steps,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "gradient_checkpointing": True,  # its own default
        # Its fastest: weights and optimizer in bfloat16 too, where the kit keeps float32.
        "model_init_kwargs": {"dtype": "bfloat16" if on_gpu else "float32"},
    }
