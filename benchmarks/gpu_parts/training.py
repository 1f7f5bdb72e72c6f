"""The trainer alone, in this process: log-probs, and updates by micro-batch and recomputation."""

from __future__ import annotations

import gc
import random
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu_parts.children import Report
from benchmarks.gpu_parts.workload import Workload
from kit.errors import StackError

Level = Literal["none", "selective", "alternating", "full"]
LEVELS: tuple[Level, ...] = ("alternating", "selective", "none")
"""In the order of their turns; the last one at every size of micro-batches."""
LONGEST = 110.0
"""Seconds after which no further level begins: other parts have to fit in as well."""


def measure(_: None, work: Workload, report: Report) -> None:
    """`LEVEL_TOKENS`: seconds of updates and the peak of allocated memory, or why there are none.

    An update is forward, backward and one optimizer step over the whole batch.
    """
    import os

    from kit.cluster.client import kept_kernels

    os.environ |= kept_kernels()
    import torch

    batch, first = train_batch(work), time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        for number, level in enumerate(LEVELS):
            if number and (report.left() < 45 or time.perf_counter() - first > LONGEST):
                report.say(f"no time for recomputation {level}")
                return
            begin = time.perf_counter()
            trainer = start(work, level, Path(directory) / level)
            report.say(f"{level}: trainer up after {time.perf_counter() - begin:.1f} s")
            if number == 0:
                _log_probs(trainer, batch, work, report)
            for tokens in work.micro_batches if level == LEVELS[-1] else work.micro_batches[:1]:
                if report.left() < 15:
                    break
                try:
                    measured = _updates(trainer, batch, tokens, work)
                    report.say(f"{level}, {tokens} tokens: {min(measured['seconds']):.2f} s")
                except StackError as error:
                    if "memory" not in error.what:
                        raise
                    measured = {"error": "does not fit"}
                    report.say(f"{level}, {tokens} tokens: does not fit")
                report.put(f"{level}_{tokens}", measured)
            del trainer
            forget(torch)


def train_batch(work: Workload) -> Any:
    """Samples of random tokens, each with a prompt of its own: nothing is shared among them."""
    from kit.messages import TrainBatch

    draw = random.Random(2)
    size = work.shape["vocab_size"]
    return TrainBatch(
        tokens=[[draw.randrange(3, size) for _ in range(work.length)] for _ in range(work.samples)],
        response_lengths=[work.response_tokens] * work.samples,
        loss_masks=[[1] * work.response_tokens for _ in range(work.samples)],
        advantages=[1.0 if number % 3 == 0 else -0.5 for number in range(work.samples)],
        rollout_log_probs=None,
    )


def start(work: Workload, level: Level, rendezvous: Path, **further: Any) -> Any:
    """A trainer in this process that recomputes so much; `further` are settings of it."""
    from kit.trainer.actor import Trainer
    from kit.trainer.settings import TrainerSettings

    trainer = Trainer(
        TrainerSettings(
            model_path=work.model,
            temperature=1.0,
            device=work.device,
            dtype="bfloat16" if work.device == "cuda" else "float32",
            seed=0,
            rank=0,
            rendezvous=str(rendezvous),
            recompute=level,
            **{
                "training": work.config().training,
                "compile": work.device == "cuda",
                "max_response_len": work.response_tokens,
                **further,
            },
        )
    )
    trainer.start()
    trainer.place()
    return trainer


def _log_probs(trainer: Any, batch: Any, work: Workload, report: Report) -> None:
    seconds = []
    for number in range(1 + work.repeats):
        begin = time.perf_counter()
        trainer.log_probs(batch.tokens, batch.response_lengths)
        if number:
            seconds.append(time.perf_counter() - begin)
    report.put("log_probs", seconds)
    report.say(f"log-probs: {min(seconds):.2f} s")


def _updates(trainer: Any, batch: Any, tokens: int, work: Workload) -> dict[str, Any]:
    import torch

    settings = trainer.settings
    trainer.use(replace(settings, max_tokens=tokens))
    try:
        # Two micro-batches bring up everything that is made once.
        some = 2 * max(1, tokens // work.length)
        trainer.update(_first(batch, min(some, work.samples)), f"warm-up {tokens}")
        if work.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for number in range(2):
            begin = time.perf_counter()
            trainer.update(batch, f"{tokens} {number}")
            seconds.append(time.perf_counter() - begin)
        peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else None
        return {"seconds": seconds, "peak": peak}
    finally:
        trainer.use(settings)
        trainer.backend.recover()
        if work.device == "cuda":
            torch.cuda.empty_cache()


def _first(batch: Any, count: int) -> Any:
    return replace(
        batch,
        tokens=batch.tokens[:count],
        response_lengths=batch.response_lengths[:count],
        loss_masks=batch.loss_masks[:count],
        advantages=batch.advantages[:count],
    )


def forget(torch: Any) -> None:
    """Give back what the trainer before held, its process group and compiled code too."""
    torch.distributed.destroy_process_group()
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
