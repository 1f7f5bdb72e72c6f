"""The machine: its GPUs, as the NVIDIA driver knows them, and its memory.

GPUs are asked of libcuda, which a session will use and which obeys CUDA_VISIBLE_DEVICES. Neither
torch is loaded nor a context made, so that it takes no time to speak of and no memory on the GPU.
How much of a GPU is free, and who holds the rest, is known to NVML, or else to `nvidia-smi`;
without either it stays unknown.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import psutil

from kit.errors import StackError

GIB = 1 << 30

VISIBLE = "CUDA_VISIBLE_DEVICES"

PCI_DEVICES = Path("/sys/bus/pci/devices")

NVIDIA_VENDOR = "0x10de"

DISPLAY_CLASS = "0x03"
"""How the PCI class of graphics and compute cards begins."""

COMPUTE_CAPABILITY = (75, 76)
"""Numbers of two device attributes in the driver's interface: major and minor."""
SMI_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class GpuProcess:
    """A process that holds memory of a GPU."""

    pid: int
    name: str
    memory: int | None
    """Bytes; None where the driver does not tell."""


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU, or the host where there is none, and its memory."""

    name: str
    total: int
    """Bytes."""
    is_gpu: bool = True
    capability: tuple[int, int] = (0, 0)
    """Compute capability of a GPU: (9, 0) is Hopper."""
    bus: str = ""
    """PCI bus id, by which all parts of the driver mean the same GPU."""
    uuid: str = ""
    """The number that the GPU itself carries, in hexadecimal; empty where the driver has none."""
    free: int | None = None
    """Bytes; None where unknown."""
    processes: tuple[GpuProcess, ...] = ()

    @classmethod
    def host(cls) -> Self:
        """The machine's own memory, or its container's, for a session without a GPU."""
        return cls("host memory", total_memory(), is_gpu=False)

    @classmethod
    def gpu(cls) -> Card | None:
        """The first GPU; None where the driver shows none."""
        return next(iter(Driver.ask().cards), None)


@dataclass(frozen=True, slots=True)
class Driver:
    """The NVIDIA driver, and the GPUs that it shows to this process."""

    trouble: str = ""
    """Why no GPU can be used, in words; empty where one can."""
    cuda: tuple[int, int] | None = None
    """The newest CUDA that it can run."""
    cards: tuple[Card, ...] = ()
    version: str = ""
    """Driver version, such as 580.95.05; empty if unknown."""
    installed: int = 0
    """NVIDIA GPUs on the machine's bus, whether the driver can use them or not."""

    @classmethod
    def ask(cls) -> Driver:
        """Ask libcuda for the GPUs of this process; never raises."""
        try:
            cuda = ctypes.CDLL("libcuda.so.1")
        except OSError:
            return cls("the driver's library libcuda.so.1 is not here")
        number = ctypes.c_int()
        cuda.cuDriverGetVersion(ctypes.byref(number))
        newest = (number.value // 1000, number.value % 1000 // 10)
        if code := cuda.cuInit(0) or cuda.cuDeviceGetCount(ctypes.byref(number)):
            text = ctypes.c_char_p()
            cuda.cuGetErrorString(code, ctypes.byref(text))
            words = (text.value or b"unknown error").decode()
            return cls(f"the driver says: {words} (error {code})", newest)
        if not number.value:
            return cls("the driver shows no card to this process", newest)
        return cls("", newest, tuple(_card(cuda, index) for index in range(number.value)))

    @classmethod
    def inspect(cls) -> Driver:
        """Ask also the bus for GPUs, and of each how much is free and who holds the rest."""
        driver = replace(cls.ask(), installed=_gpus_on_the_bus())
        if driver.cards:
            for source in (_from_nvml, _from_smi):
                # Either may be missing, too old for the driver, or shut out by a container.
                with contextlib.suppress(Exception):
                    return source(driver)
        return driver


def _card(cuda: Any, index: int) -> Card:
    device, total = ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name, bus = ctypes.create_string_buffer(256), ctypes.create_string_buffer(64)
    uuid = ctypes.create_string_buffer(16)
    cuda.cuDeviceGetName(name, len(name), device)
    cuda.cuDeviceGetPCIBusId(bus, len(bus), device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(total), device)
    has_uuid = not cuda.cuDeviceGetUuid_v2(uuid, device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    for value, attribute in zip((major, minor), COMPUTE_CAPABILITY, strict=True):
        cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return Card(
        name.value.decode(errors="replace"),
        total.value,
        capability=(major.value, minor.value),
        bus=bus.value.decode(),
        uuid=uuid.raw.hex() if has_uuid else "",
    )


def _from_nvml(driver: Driver) -> Driver:
    import pynvml  # the module of nvidia-ml-py

    pynvml.nvmlInit()
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        cards = []
        for card in driver.cards:
            handle = pynvml.nvmlDeviceGetHandleByPciBusId(card.bus.encode())
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
            processes = tuple(_process(each.pid, each.usedGpuMemory) for each in running)
            free = pynvml.nvmlDeviceGetMemoryInfo(handle).free
            cards.append(replace(card, free=free, processes=processes))
    finally:
        pynvml.nvmlShutdown()
    return replace(driver, cards=tuple(cards), version=str(version))


def _from_smi(driver: Driver) -> Driver:
    memory = _smi("--query-gpu=pci.bus_id,memory.free,driver_version")
    running = _smi("--query-compute-apps=gpu_bus_id,pid,used_memory")
    cards = []
    for card in driver.cards:
        (free,) = [row[1] for row in memory if _same_bus(row[0], card.bus)]
        processes = tuple(
            _process(int(pid), _mebibytes(used))
            for bus, pid, used in running
            if _same_bus(bus, card.bus)
        )
        cards.append(replace(card, free=_mebibytes(free), processes=processes))
    return replace(driver, cards=tuple(cards), version=memory[0][2])


def _smi(query: str) -> list[list[str]]:
    command = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_SECONDS, check=True)
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line]


def _same_bus(one: str, other: str) -> bool:
    """Whether two bus ids are the same: their domain has four digits or eight."""
    return one.lower()[-12:] == other.lower()[-12:]


def _mebibytes(text: str) -> int | None:
    return int(text) << 20 if text.isdigit() else None


def _process(pid: int, memory: int | None) -> GpuProcess:
    try:
        name = psutil.Process(pid).name()
    except psutil.Error:
        name = "not visible from here"  # of another container, or gone by now
    return GpuProcess(pid, name, memory)


def gpu_count() -> int:
    """Number of GPUs that the driver shows to this process."""
    return len(Driver.ask().cards)


def gpu_uuids(count: int) -> list[str]:
    """UUIDs of the first `count` GPUs of this process."""
    return [card.uuid for card in Driver.ask().cards[:count] if card.uuid]


def visible_gpus() -> list[str]:
    """GPUs that a session may take, under the names that CUDA_VISIBLE_DEVICES gives them."""
    visible = os.environ.get(VISIBLE)
    if visible is None:
        return [str(index) for index in range(gpu_count())]
    return [name.strip() for name in visible.split(",") if name.strip() not in ("", "-1")]


def installed_gpus() -> list[str]:
    """Names of all NVIDIA GPUs of the machine, hidden ones included; empty if unknown.

    It asks `nvidia-smi`, because a process that has initialised libcuda must not fork.
    """
    try:
        return [row[0] for row in _smi("--query-gpu=name")]
    except (OSError, subprocess.SubprocessError):
        return []


def _gpus_on_the_bus() -> int:
    count = 0
    with contextlib.suppress(OSError):
        for device in PCI_DEVICES.iterdir():
            with contextlib.suppress(OSError):
                vendor = (device / "vendor").read_text().strip()
                is_display = (device / "class").read_text().startswith(DISPLAY_CLASS)
                count += vendor == NVIDIA_VENDOR and is_display
    return count


def pick_device(wanted: str, *, joins: bool = False) -> str:
    """Choose `cpu` or `cuda`. Raises StackError where CUDA is asked for and there is none.

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


CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where the kernel shows the limits of containers, and of the jobs of batch systems."""
OWN_GROUP = Path("/proc/self/cgroup")
"""Says in which of them this process is."""
_SECOND = ("memory.max", "memory.current", "memory.stat", "inactive_file")
_FIRST = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    "memory.stat",
    "total_inactive_file",
)


def total_memory() -> int:
    """Bytes that this process and those beside it may take: the machine's, or its container's."""
    limits = (limit for limit, _ in _limits())
    return min(int(psutil.virtual_memory().total), *limits, sys.maxsize)


def free_memory() -> int:
    """Bytes that this process may still take: the machine's, or its container's where less.

    Files that are only cached count as free: the kernel drops them when memory runs short.
    """
    free = (max(limit - used, 0) for limit, used in _limits())
    return min(int(psutil.virtual_memory().available), *free, sys.maxsize)


def _limits() -> Iterator[tuple[int, int]]:
    """(bytes that a control group may take, bytes that it holds beside cached files), of each one
    with a limit that this process is in: its own and all above it.
    """
    for root, group, (limit, used, stat, cached) in _groups():
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # not there, or no limit: `max`
                most, held = (int((root / folder / name).read_text()) for name in (limit, used))
                text = (root / folder / stat).read_text()
                amounts = dict(line.split() for line in text.splitlines())
                yield most, held - int(amounts.get(cached, 0))


def _groups() -> Iterator[tuple[Path, Path, tuple[str, str, str, str]]]:
    """(root, own group below it, names of the files) of both versions of control groups.

    In a container the root is mostly the container's own group. Then what the kernel says may be
    the host's name of it, which is not there; the root, which is always looked at, has the limit.
    """
    second = first = Path()
    with contextlib.suppress(OSError):
        for line in OWN_GROUP.read_text().splitlines():
            _, kinds, place = line.split(":", 2)
            own = Path(place.lstrip("/"))
            if not kinds:
                second = own
            elif "memory" in kinds.split(","):
                first = own
    yield CONTROL_GROUPS, second, _SECOND
    yield CONTROL_GROUPS / "memory", first, _FIRST
