"""What the NVIDIA driver says of itself and of its cards.

Cards are asked of libcuda, which a session will use and which knows CUDA_VISIBLE_DEVICES; making no
context, that takes no memory on them. How much is free, and who holds the rest, is known to NVML,
or else to `nvidia-smi`; without either it stays unknown.
"""

from __future__ import annotations

import contextlib
import ctypes
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

PCI = Path("/sys/bus/pci/devices")


NVIDIA = "0x10de"


DISPLAY = "0x03"
"""How the PCI class of graphics and compute cards begins."""


COMPUTE_CAPABILITY = (75, 76)
"""Numbers of two device attributes in the driver's interface: major and minor."""


SMI_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Program:
    """A process that holds memory of a card."""

    pid: int
    name: str
    memory: int | None
    """Bytes; None where the driver does not tell."""


@dataclass(frozen=True, slots=True)
class Card:
    """One card, as this process sees it."""

    name: str
    capability: tuple[int, int]
    total: int
    """Bytes."""
    bus: str
    """PCI bus id, by which the driver's parts mean the same card."""
    free: int | None = None
    programs: tuple[Program, ...] = ()


@dataclass(frozen=True, slots=True)
class Driver:
    """The driver and its cards."""

    trouble: str = ""
    """Why no card can be used, in words; empty where one can."""
    cuda: tuple[int, int] | None = None
    """The newest CUDA that it can run."""
    cards: tuple[Card, ...] = ()
    version: str = ""
    """Its own number, such as 580.95.05; empty where nothing tells."""
    installed: int = 0
    """NVIDIA cards on the machine's bus, whether the driver can use them or not."""


def ask() -> Driver:
    """Everything about the driver and its cards; never raises."""
    installed = _cards_on_the_bus()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return Driver("the driver's library libcuda.so.1 is not here", installed=installed)
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    newest = (version.value // 1000, version.value % 1000 // 10)
    count = ctypes.c_int()
    if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(count)):
        return Driver(f"the driver says: {_words(cuda, code)}", newest, installed=installed)
    if not count.value:
        return Driver("the driver shows no card to this process", newest, installed=installed)
    cards = tuple(_card(cuda, index) for index in range(count.value))
    return _with_memory(Driver("", newest, cards, installed=installed))


def _words(cuda: Any, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} (error {code})"


def _card(cuda: Any, index: int) -> Card:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetPCIBusId(bus, len(bus), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    numbers = []
    for attribute in COMPUTE_CAPABILITY:
        number = ctypes.c_int()
        cuda.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
        numbers.append(number.value)
    capability = (numbers[0], numbers[1])
    return Card(name.value.decode(errors="replace"), capability, total.value, bus.value.decode())


def _with_memory(driver: Driver) -> Driver:
    for source in (_of_nvml, _of_smi):
        # Either may be missing, too old for the driver, or shut out by a container.
        with contextlib.suppress(Exception):
            return source(driver)
    return driver


def _of_nvml(driver: Driver) -> Driver:
    import pynvml  # the module of nvidia-ml-py

    pynvml.nvmlInit()
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        cards = []
        for card in driver.cards:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(card.bus.encode())
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            programs = tuple(_program(each.pid, each.usedGpuMemory) for each in running)
            free = pynvml.nvmlDeviceGetMemoryInfo(handle).free
            cards.append(replace(card, free=free, programs=programs))
    finally:
        pynvml.nvmlShutdown()
    return replace(driver, cards=tuple(cards), version=str(version))


def _of_smi(driver: Driver) -> Driver:
    memory = _smi("--query-gpu=pci.bus_id,memory.free,driver_version")
    running = _smi("--query-compute-apps=gpu_bus_id,pid,used_memory")
    cards = []
    for card in driver.cards:
        (free,) = [row[1] for row in memory if _same_bus(row[0], card.bus)]
        programs = tuple(
            _program(int(pid), _mebibytes(used))
            for bus, pid, used in running
            if _same_bus(bus, card.bus)
        )
        cards.append(replace(card, free=_mebibytes(free), programs=programs))
    return replace(driver, cards=tuple(cards), version=memory[0][2])


def _smi(query: str) -> list[list[str]]:
    words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]


def _same_bus(one: str, other: str) -> bool:
    """The domain has four digits in one place and eight in another."""
    return one.lower()[-12:] == other.lower()[-12:]


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None


def _program(pid: int, memory: int | None) -> Program:
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "not visible from here"  # of another container, or gone by now
    return Program(pid, name, memory)


def _cards_on_the_bus() -> int:
    found = 0
    with contextlib.suppress(OSError):
        for device in PCI.iterdir():
            with contextlib.suppress(OSError):
                vendor = (device / "vendor").read_text().strip()
                found += vendor == NVIDIA and (device / "class").read_text().startswith(DISPLAY)
    return found
