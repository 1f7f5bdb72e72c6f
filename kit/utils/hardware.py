"""`Card`: the device that a plan is made for, asked of the driver without loading torch.

What the machine offers: which device a session takes, and how many engines.
"""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil

from kit.errors import StackError

GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Card:
    """A device and its memory."""

    name: str
    total: int
    """Bytes."""
    is_gpu: bool
    capability: tuple[int, int] = (0, 0)
    """Of a GPU: (9, 0) is Hopper."""

    @classmethod
    def host(cls) -> Self:
        """This machine's own memory, where there is no GPU."""
        return cls("host memory", psutil.virtual_memory().total, False)

    @classmethod
    def gpu(cls) -> Self | None:
        """The first GPU; None where the driver shows none."""
        try:
            driver = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return None
        count, device = ctypes.c_int(), ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return None
        name, total = ctypes.create_string_buffer(128), ctypes.c_size_t()
        major, minor = ctypes.c_int(), ctypes.c_int()
        driver.cuDeviceGet(ctypes.byref(device), 0)
        driver.cuDeviceGetName(name, 128, device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(total), device)
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device)
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
        return cls(name.value.decode(), total.value, True, (major.value, minor.value))


def in_gib(size: float) -> str:
    """Bytes as `1.5 GiB`, or as `12 MiB` where they are few."""
    return f"{size / GIB:.1f} GiB" if abs(size) >= GIB else f"{size / 2**20:,.0f} MiB"


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


VISIBLE = "CUDA_VISIBLE_DEVICES"


def gpus() -> list[str]:
    """The GPUs that a session may take, as CUDA_VISIBLE_DEVICES names them; asks no library that
    takes seconds to load.
    """
    visible = os.environ.get(VISIBLE)
    if visible is not None:
        return [card.strip() for card in visible.split(",") if card.strip() not in ("", "-1")]
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    number = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(number)):
        return []
    return [str(card) for card in range(number.value)]


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's where less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        numbers = [_number(Path("/sys/fs/cgroup") / name) for name in (limit, used)]
        if numbers[0] is not None and numbers[1] is not None:
            free = min(free, max(numbers[0] - numbers[1], 0))
    return free


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # not there, or `max`
        return None


def card() -> str:
    """Which GPU a session with one takes, by the number that the card itself carries."""
    return "".join(cards(1))


def cards(count: int) -> list[str]:
    """The same of the first so many GPUs that this process sees."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return []
    if driver.cuInit(0):
        return []
    found = []
    for number in range(count):
        device, uuid = ctypes.c_int(), ctypes.create_string_buffer(16)
        wrong = driver.cuDeviceGet(ctypes.byref(device), number)
        if not wrong and not driver.cuDeviceGetUuid_v2(uuid, device):
            found.append(uuid.raw.hex())
    return found
