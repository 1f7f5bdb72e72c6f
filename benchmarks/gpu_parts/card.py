"""The card's own rates, measured with plain torch, and the model that everything else runs."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.gpu_parts.children import Report
from benchmarks.gpu_parts.workload import Workload

PEAKED = 6.0
"""Factor of a mixture's last norm: random logits are otherwise nearly equal."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def write_model(_: None, work: Workload, report: Report) -> None:
    """`make_model`, and how large it is."""
    report.put("bytes", make_model(work))


def make_model(work: Workload) -> int:
    """A model directory of the workload's shape, with random weights and no end of a response.

    Returns:
        Bytes of its weights.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from kit.models.source import TINY_DIRECTORY

    mixture = "num_experts" in work.shape
    kind = "qwen3_moe" if mixture else "qwen3"
    no_end = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **work.shape, **no_end)
    torch.manual_seed(0)
    with torch.device(work.device):
        model = AutoModelForCausalLM.from_config(config)
    if mixture:
        with torch.no_grad():
            model.model.norm.weight *= PEAKED
    dtype = torch.bfloat16 if work.device == "cuda" else torch.float32
    model.to(dtype).save_pretrained(work.model)
    for name in TOKENIZER_FILES:
        shutil.copy(TINY_DIRECTORY / name, work.model)
    return sum(file.stat().st_size for file in Path(work.model).glob("*.safetensors"))


def measure(_: None, work: Workload, report: Report) -> None:
    """Bytes and operations a second, one value a repetition."""
    _copies(work, report)
    _matrix_products(work, report)


def _copies(work: Workload, report: Report) -> None:
    import torch

    on_gpu, size = work.device == "cuda", work.copied
    source = torch.ones(size, dtype=torch.uint8, device=work.device)
    target = torch.empty_like(source)
    report.put("copy", _rates(lambda: target.copy_(source), 2 * size, work))
    pinned = torch.ones(size, dtype=torch.uint8, pin_memory=on_gpu)
    report.put("to_device", _rates(lambda: target.copy_(pinned, non_blocking=True), size, work))
    report.put("to_host", _rates(lambda: pinned.copy_(target, non_blocking=True), size, work))
    report.say("copies within the device, to it and from it")


def _matrix_products(work: Workload, report: Report) -> None:
    import torch

    dtype = torch.bfloat16 if work.device == "cuda" else torch.float32
    a, b = (torch.randn(work.matrix, work.matrix, device=work.device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    operations = 2 * work.matrix**3
    report.put("matrix", _rates(lambda: torch.mm(a, b, out=product), operations, work))
    report.say("matrix products")


def _rates(work_once: Callable[[], Any], amount: int, work: Workload) -> list[float]:
    """Amounts a second; ten calls a measurement, so that launching them does not show."""
    import torch

    def finish() -> None:
        if work.device == "cuda":
            torch.cuda.synchronize()

    def seconds(calls: int) -> float:
        finish()
        begin = time.perf_counter()
        for _ in range(calls):
            work_once()
        finish()
        return time.perf_counter() - begin

    seconds(3)
    return [10 * amount / seconds(10) for _ in range(work.repeats)]


def nvidia_smi(field: str) -> str:
    """A field of the first card, as the driver says it; empty where there is no driver."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def device_memory() -> int | None:
    """Bytes of the card that are taken, by everybody; None without a card."""
    used = nvidia_smi("memory.used")
    return int(used) << 20 if used.isdigit() else None


def memory_by_process() -> dict[str, int]:
    """Bytes of the card that each process has, by its name; none where the driver hides them."""
    query = "--query-compute-apps=pid,used_memory"
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        rows = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    found = {}
    for pid, used in (row.split(", ") for row in rows.splitlines()):
        with suppress(psutil.NoSuchProcess, ValueError):
            found[f"{psutil.Process(int(pid)).name()} {pid}"] = int(used) << 20
    return found
