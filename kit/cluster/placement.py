"""Layout of trainers and engines on devices, and the Ray options that place actors there.

`Layout` is decided before anything starts:

    colocated, 2 trainers, 2 engines        device 0: rank 0, engine 0    device 1: rank 1, engine 1
    colocated, 2 trainers, 1 engine of 2    device 0: rank 0, half of it  device 1: rank 1, half
    disaggregated, 1 trainer, 1 engine      device 0: rank 0              device 1: engine 0

Devices are numbered from 0: GPUs of this machine, or bundles of a placement group where the session
joins a cluster. On a CPU a device is a share of the machine's cores.

`Placement` turns a device's number into Ray's options, once the head is up; `joined.py` has the one
for a placement group.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from kit.cluster.processes import Elsewhere
from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.models.source import ModelSource
from kit.utils.formatting import count
from kit.utils.hardware import gpu_count

LOOPBACK = "127.0.0.1"
SMALL_MODEL = 64 << 20
"""Bytes of weights. Handling requests costs a model of this size more than its arithmetic does."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of a stack: the devices of each trainer and each engine."""

    trainers: tuple[int, ...]
    """The device of each rank."""
    engines: tuple[tuple[int, ...], ...]
    """The devices of each engine."""
    colocate: bool

    @classmethod
    def of(cls, config: SessionConfig, device: str, model_bytes: int) -> Self:
        """Lay out trainers and engines for a configuration.

        Args:
            config: the settings; `engine.replicas` is chosen where it is left open.
            device: `cpu` or `cuda`.
            model_bytes: of the weights' files.

        Raises:
            ConfigError: trainers and engines cannot share devices in this way.
        """
        ranks, width = config.training.num_trainers, config.engine.tensor_parallel
        colocate, gpu = config.cluster.colocate, device == "cuda"
        if width > 1 and not gpu:
            raise ConfigError(
                f"engine.tensor_parallel is {width}, and the device is the CPU.",
                why="SGLang's ranks of one engine meet through NCCL also where they compute on "
                "CPUs, and NCCL needs GPUs.",
                fix="set engine.tensor_parallel: 1; engines side by side are engine.replicas.",
            )
        replicas = config.engine.replicas
        if replicas is None and gpu:
            replicas = max(ranks // width, 1) if colocate else 1
        replicas = replicas or default_replicas(device, model_bytes)
        if not colocate:
            places = [ranks + i * width for i in range(replicas)]
        elif width > 1:
            places = [i * width for i in range(replicas)]
        else:
            places = [i % ranks for i in range(replicas)]
        if colocate and gpu:
            _check_sharing(ranks, replicas, width)
        engines = tuple(tuple(range(place, place + width)) for place in places)
        return cls(tuple(range(ranks)), engines, colocate)

    @property
    def count(self) -> int:
        """Number of devices."""
        return 1 + max(*self.trainers, *(place for engine in self.engines for place in engine))

    @property
    def replicas(self) -> int:
        """Number of engines."""
        return len(self.engines)

    def source_ranks(self, engine: int) -> list[int]:
        """Ranks on an engine's devices, in the order of the devices; colocated only."""
        return [self.trainers.index(place) for place in self.engines[engine]]

    def feeds(self, rank: int) -> bool:
        """Whether a rank hands weights over itself; where they are broadcast, only rank 0 does."""
        if not self.colocate:
            return rank == 0
        return any(self.trainers[rank] in places for places in self.engines)

    def sharing(self, place: int) -> int:
        """Number of actors on a device."""
        return self.trainers.count(place) + sum(place in places for places in self.engines)

    def in_words(self) -> str:
        """Description, such as `2 trainers and 2 engines colocated on 2 devices`."""
        ranks, engines, width = len(self.trainers), len(self.engines), len(self.engines[0])
        each = f" of {width} devices each" if width > 1 else ""
        how = "colocated on" if self.colocate else "disaggregated, on"
        return (
            f"{count(ranks, 'trainer')} and {count(engines, 'engine')}{each} {how} "
            f"{count(self.count, 'device')}"
        )


def default_replicas(device: str, model_bytes: int) -> int:
    """Number of engines if the configuration leaves it open."""
    small = device == "cpu" and model_bytes <= SMALL_MODEL
    return 2 if small and (os.cpu_count() or 1) > 1 else 1


class Placement:
    """Actors on the head that the session has started: this machine, its GPUs by number."""

    def __init__(self, layout: Layout, device: str, directory: Path) -> None:
        """`directory`: the stack's own, on this machine."""
        self.layout, self._device = layout, device
        self.folder = directory / "tmp"
        """For files by which processes on this machine find each other."""

    def options(self, place: int) -> dict[str, Any]:
        """Ray's options of an actor on this device."""
        if self._device != "cuda" or self.layout.count > 1:
            return {}  # with several GPUs each actor is told its own
        return {"num_gpus": 1.0 / self.layout.sharing(place)}  # Ray only counts the shares

    def visible_devices(self, places: Sequence[int]) -> str:
        """CUDA_VISIBLE_DEVICES of an actor on these devices; empty where Ray sets it."""
        if self._device != "cuda" or self.layout.count == 1:
            return ""
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return ",".join(named[place] if named else str(place) for place in places)

    def rendezvous(self, name: str) -> str:
        """Rendezvous of the ranks' process group: a file that no other user can reach."""
        return str(self.folder / f"rendezvous-{name}")

    @property
    def address(self) -> str:
        """Address at which engines reach rank 0 for a broadcast of its weights."""
        return LOOPBACK

    def members(self, actor: Any, place: int, pids: Sequence[int]) -> list[int | Elsewhere]:
        """Members that a `Watch` checks for an actor on this device with these processes."""
        return [*pids]


def _check_sharing(ranks: int, replicas: int, width: int) -> None:
    """Refuse an uneven load of GPUs: FSDP waits for the slowest."""
    slots = replicas * width
    if slots == ranks or (width == 1 and slots % ranks == 0):
        return
    raise ConfigError(
        f"{count(ranks, 'trainer')} and {count(replicas, 'engine')} of "
        f"{count(width, 'GPU')} cannot be colocated.",
        why=f"Each trainer has a GPU, and the engines would take {slots} of those {ranks}; each "
        "engine is fed by the trainers on its own GPUs.",
        fix=f"make engine.replicas x engine.tensor_parallel {ranks} (training.num_trainers), or "
        "set cluster.colocate: false, which takes devices for trainers and engines apart.",
    )


def check_devices(config: SessionConfig, model: ModelSource, device: str) -> None:
    """Raise ConfigError if trainers and engines do not fit on this machine's GPUs.

    What a cluster has that will be joined is asked when it is joined.
    """
    layout = Layout.of(config, device, model.bytes)
    if device != "cuda" or config.cluster.address is not None:
        return
    if layout.count > (there := gpu_count()):
        raise ConfigError(
            f"The session takes {layout.count} GPUs ({layout.in_words()}), and this process sees "
            f"{there}.",
            fix="lower training.num_trainers, engine.replicas or engine.tensor_parallel; or set "
            "cluster.colocate: true, with which trainers and engines share devices.",
        )
