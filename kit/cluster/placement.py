"""Where the actors of a stack run: on the session's own head, or in a placement group elsewhere.

`Layout`: which device each trainer and each engine has; decided before anything starts.

    colocated, 2 trainers, 2 engines        device 0: rank 0, engine 0    device 1: rank 1, engine 1
    colocated, 2 trainers, 1 engine of 2    device 0: rank 0, half of it  device 1: rank 1, half
    disaggregated, 1 trainer, 1 engine      device 0: rank 0              device 1: engine 0

Devices are numbered from 0: GPUs of this machine, or bundles of a placement group where the session
joins a cluster. On a CPU a device is a share of the machine's cores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.models.source import ModelSource
from kit.utils.formatting import count
from kit.utils.hardware import default_replicas, gpu_count

if TYPE_CHECKING:
    from kit.cluster.client import Cluster
    from kit.cluster.joined import Bundle
    from kit.stack.stack import Stack


LOOPBACK = "127.0.0.1"


class OwnPlacement:
    """On the head that the session has started: this machine, its GPUs by number."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack

    def options(self, place: int) -> dict[str, Any]:
        """Ray's options of an actor on this device."""
        layout = self._stack.layout
        if self._stack.device != "cuda" or layout.count > 1:
            return {}  # with several cards each actor is told its own
        return {"num_gpus": 1.0 / layout.sharing(place)}  # Ray only counts the shares

    def cards(self, places: Sequence[int]) -> str:
        """CUDA_VISIBLE_DEVICES of an actor on these devices; empty where Ray sets it."""
        if self._stack.device != "cuda" or self._stack.layout.count == 1:
            return ""
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return ",".join(named[place] if named else str(place) for place in places)

    def rendezvous(self, meeting: str) -> str:
        """Where all ranks meet: a file, which nobody else can reach."""
        return str(self._stack.cluster.directory / "tmp" / f"rendezvous-{meeting}")

    @property
    def address(self) -> str:
        """Where rank 0 is reached by engines that wait for its weights."""
        return LOOPBACK

    def is_here(self, place: int) -> bool:
        """Is this device on the client's machine?"""
        return True


class JoinedPlacement:
    """In the bundles of a placement group, of which each has a device."""

    def __init__(self, stack: Stack, group: Any, bundles: Sequence[Bundle], node: str) -> None:
        """`node`: Ray's id of the client's own node."""
        self._stack, self._group, self._bundles, self._node = stack, group, bundles, node
        self._all_here = all(bundle.node == node for bundle in bundles)

    def options(self, place: int) -> dict[str, Any]:
        """Ray's options of an actor in this bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._bundles[place].index
            ),
            "runtime_env": {"env_vars": self._stack.cluster.actors_environment},
        }

    def cards(self, places: Sequence[int]) -> str:
        """CUDA_VISIBLE_DEVICES of an actor in these bundles."""
        return ",".join(self._bundles[place].card for place in places)

    def rendezvous(self, meeting: str) -> str:
        """A file where all are on this machine; else a port of the first rank's node."""
        if self._all_here:
            return str(self._stack.cluster.directory / "tmp" / f"rendezvous-{meeting}")
        import ray

        port = ray.remote(num_cpus=0)(_free_port).options(**self.options(0)).remote()
        return f"tcp://{self._bundles[0].host}:{ray.get(port)}"

    @property
    def address(self) -> str:
        """Where rank 0 is reached by engines that wait for its weights."""
        return LOOPBACK if self._all_here else self._bundles[0].host

    def is_here(self, place: int) -> bool:
        """Is this bundle on the client's machine?"""
        return self._bundles[place].node == self._node


def _free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def start_cluster(stack: Stack) -> Cluster:
    """The first process of a stack: a Ray head of its own, or what holds its share of another."""
    from kit.cluster.client import Cluster
    from kit.cluster.joined import JoinedCluster

    config, layout = stack.config, stack.layout
    if config.cluster.address is None:
        return Cluster(stack.device, gpus=gpu_count() if stack.device == "cuda" else 0)
    width = config.engine.tensor_parallel
    return JoinedCluster(stack.device, config.cluster.address, layout.count, width)


@dataclass(frozen=True, slots=True)
class Layout:
    """Who is where."""

    trainers: tuple[int, ...]
    """The device of each rank."""
    engines: tuple[tuple[int, ...], ...]
    """The devices of each engine."""
    colocate: bool

    @classmethod
    def of(cls, config: SessionConfig, device: str, model_bytes: int) -> Self:
        """For these settings.

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
        """Devices in all."""
        return 1 + max(*self.trainers, *(place for engine in self.engines for place in engine))

    def source_ranks(self, engine: int) -> list[int]:
        """The ranks on an engine's devices, in the order of the devices; colocated only."""
        return [self.trainers.index(place) for place in self.engines[engine]]

    def feeds(self, rank: int) -> bool:
        """Does a rank hand weights over itself? Where they are broadcast, the first does."""
        if not self.colocate:
            return rank == 0
        return any(self.trainers[rank] in places for places in self.engines)

    def sharing(self, place: int) -> int:
        """How many actors a device has."""
        return self.trainers.count(place) + sum(place in places for places in self.engines)

    def in_words(self) -> str:
        """`2 trainers and 2 engines colocated on 2 devices`."""
        ranks, engines, width = len(self.trainers), len(self.engines), len(self.engines[0])
        each = f" of {width} devices each" if width > 1 else ""
        how = "colocated on" if self.colocate else "disaggregated, on"
        return (
            f"{count(ranks, 'trainer')} and {count(engines, 'engine')}{each} {how} "
            f"{count(self.count, 'device')}"
        )


def _check_sharing(ranks: int, replicas: int, width: int) -> None:
    """On GPUs every device gets as much to do as the others: FSDP waits for the slowest."""
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
    """Raise ConfigError where trainers and engines do not fit on the GPUs that are here.

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
