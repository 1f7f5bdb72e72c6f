"""`Card`: the device that a plan is made for, asked of the driver without loading torch."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Self

import psutil

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
