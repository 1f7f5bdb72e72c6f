"""Where the actors of a stack run: on the session's own head, or in a placement group elsewhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kit.stack.cluster import Cluster
    from kit.stack.joined import Bundle
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
    from kit.stack.cluster import Cluster
    from kit.stack.joined import JoinedCluster
    from kit.stack.machine import gpu_count

    config, layout = stack.config, stack.layout
    if config.cluster.address is None:
        return Cluster(stack.device, gpus=gpu_count() if stack.device == "cuda" else 0)
    width = config.engine.tensor_parallel
    return JoinedCluster(stack.device, config.cluster.address, layout.count, width)
