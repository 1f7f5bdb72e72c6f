"""What the machine offers: which device a session takes, and how many engines."""

from __future__ import annotations

import ctypes
import os

from kit.errors import StackError


def pick_device(wanted: str, *, joins: bool = False) -> str:
    """`cpu` or `cuda`. Raises StackError where CUDA is asked for and there is none.

    Args:
        wanted: `auto`, `cpu` or `cuda`.
        joins: will a Ray cluster be joined, whose other nodes may have GPUs?
    """
    count = gpu_count()
    if wanted == "cuda" and not count and not joins:
        raise StackError(
            "device is cuda, but no GPU can be used here.",
            why="The NVIDIA driver (libcuda.so.1) is missing or sees no card.",
            fix="set device: cpu (or auto), or install the driver and check `nvidia-smi`.",
        )
    return "cuda" if wanted == "cuda" or (wanted == "auto" and count) else "cpu"


def gpu_count() -> int:
    """How many GPUs the driver shows to this process; asks the driver, so torch stays unloaded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


SMALL_MODEL = 64 << 20
"""Bytes of weights. Handling requests costs a model of this size more than its arithmetic does."""


def default_replicas(device: str, model_bytes: int) -> int:
    """How many engines to start where the configuration leaves it open."""
    small = device == "cpu" and model_bytes <= SMALL_MODEL
    return 2 if small and (os.cpu_count() or 1) > 1 else 1


def shares(count: int, among: int) -> list[slice]:
    """Neighbouring stretches of `count` things, as even as can be; none is empty."""
    among = min(among, count)
    return [slice(i * count // among, (i + 1) * count // among) for i in range(among)]
