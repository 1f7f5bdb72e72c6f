"""Where an update of the trainer goes: kernels, times without one, and waits for the card."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::item", "aten::nonzero")
"""What of the host's calls waits for the card."""
LISTED = 24
"""Kernels that take longest, which are listed."""


def profile(update: Callable[[], object]) -> dict[str, Any]:
    """Seconds, kernels and waits of one update, which a profiler makes longer.

    `kernels` are by name: milliseconds, and how often. `idle` is when the card has nothing to do.
    """
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        begun = time.perf_counter()
        update()
        torch.cuda.synchronize()
        took = time.perf_counter() - begun
    times, waits = defaultdict(list), defaultdict(int)
    spans = []
    for event in profiler.events():
        if event.is_user_annotation:  # what FSDP marks has kernels and waits in it
            continue
        if event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.name[:110]].append(event.time_range.elapsed_us() / 1000)
            spans.append((event.time_range.start, event.time_range.end))
        elif event.name in WAITS:
            waits[event.name] += 1
    busy = _covered(spans) / 1e6
    order = sorted(times, key=lambda name: -sum(times[name]))
    return {
        "seconds": took,
        "busy": busy,
        "idle": took - busy,
        "launched": len(spans),
        "waits": dict(waits),
        "kernels": {name: [sum(times[name]), len(times[name])] for name in order[:LISTED]},
    }


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """How much at least one of some spans covers."""
    total, last = 0.0, 0.0
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, last))
        last = max(last, end)
    return total
