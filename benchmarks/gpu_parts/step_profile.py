"""Where the steps of a decoding engine go, by kernel: SGLang's own profiler, read and summed."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

KINDS = {
    "attention": (
        "flashattn",
        "attention",
        "_fwd_grouped",
        "_fwd_kernel",
        "store_kvcache",
        "parts_kernel",
        "together_kernel",
    ),
    "sampling": ("columns_kernel", "best_kernel"),
    "quantising": ("rows_kernel",),
    "norms, rotations, activations": ("norm", "rotation", "rope", "silu", "act_and_mul"),
    "products": ("gemm", "product", "nvjet", "splitk"),
}
"""Parts of kernels' names, looked for in this order."""
DECODED = 40
"""Tokens that are written while the profiler looks; the second half is counted."""


def profile(running: Any, prompts: list[list[int]], folder: Path, layers: int) -> dict[str, Any]:
    """Microseconds of a step by kind and by kernel, and of the card's idle time.

    Args:
        running: SGLang's engine, which has decoded as many before.
        prompts: token ids.
        folder: where the profiler may write.
        layers: of the model; each attends once a step.
    """
    sampling = {"temperature": 1.0, "max_new_tokens": DECODED}
    how = {"activities": ["GPU"], "with_stack": False, "record_shapes": False}
    running.flush_cache()
    running.start_profile(output_dir=str(folder), **how)
    running.generate(input_ids=prompts, sampling_params=sampling, return_logprob=True)
    running.stop_profile()
    (file,) = folder.glob("*.trace.json.gz")
    with gzip.open(file, "rt") as opened:
        events = json.load(opened)["traceEvents"]
    kernels = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy")]
    kernels.sort(key=lambda event: event["ts"])
    # The head's product ends a step: the second half of the steps is whole ones.
    middle = kernels[0]["ts"] + (kernels[-1]["ts"] - kernels[0]["ts"]) * 0.6
    return summed([event for event in kernels if event["ts"] >= middle], layers)


def summed(kernels: list[dict[str, Any]], layers: int) -> dict[str, Any]:
    """The kernels of some steps by kind and name, microseconds of one step."""
    names: dict[str, list[float]] = defaultdict(list)
    for event in kernels:
        names[event["name"][:110]].append(event["dur"])
    attended = max(
        (len(each) for name, each in names.items() if kind_of(name) == "attention"), default=layers
    )
    steps = attended / layers
    span = kernels[-1]["ts"] + kernels[-1]["dur"] - kernels[0]["ts"]
    kinds: dict[str, float] = defaultdict(float)
    for name, each in names.items():
        kinds[kind_of(name)] += sum(each) / steps
    kinds["nothing runs"] = span / steps - sum(kinds.values())
    order = sorted(names, key=lambda name: -sum(names[name]))[:24]
    return {
        "steps": steps,
        "step": span / steps,
        "kinds": dict(kinds),
        "kernels": {name: [sum(names[name]) / steps, len(names[name]) / steps] for name in order},
    }


def kind_of(name: str) -> str:
    """Which of `KINDS` a kernel is, by its name."""
    low = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(p in low for p in parts)), "others")
