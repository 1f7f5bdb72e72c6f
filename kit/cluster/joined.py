"""`JoinedCluster`: a placement group on a Ray cluster that others run.

    client ── own, leave, end, silence ──► keeper (kit.cluster.head, on the client's machine)
                                             │ the driver whose placement group it is
                                             ▼
                                        placement group: a bundle for each device
                                             │ actors run in it
                                             ▼
                                        trainers, engines

The lease is as with a head of our own. The group belongs to the keeper: however the keeper ends,
killed included, Ray takes the group down, and with it every actor in it. Nothing stays behind on a
cluster that is not ours.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.cluster import client
from kit.cluster.client import Cluster
from kit.cluster.placement import LOOPBACK, Layout, Placement
from kit.cluster.processes import Elsewhere
from kit.cluster.registry import Entry
from kit.errors import KitError, StackError
from kit.utils.files import replace_file
from kit.utils.reading import read_json

REFUSED = "refused"
"""A file in which the keeper says why there is no placement group."""

CONNECT_SECONDS = 3.0
"""Within which a cluster's control service has to accept a connection."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """One device of the placement group."""

    index: int
    """In the group."""
    node: str
    """Ray's id of the node."""
    host: str
    """Address of the node."""
    card: str
    """Number of the GPU on its node, as in CUDA_VISIBLE_DEVICES; empty on a CPU."""


class JoinedCluster(Cluster):
    """Share of a Ray cluster that others run, held by a keeper process of the session."""

    def __init__(self, device: str, address: str, bundles: int, width: int) -> None:
        """Start the keeper in the background; `connect` waits for it.

        Args:
            device: `cpu` or `cuda`.
            address: of the cluster, or `auto`.
            bundles: devices to reserve.
            width: so many of them, in order, have to be on one node.
        """
        self.wanted = {"address": address, "bundles": bundles, "width": width}
        super().__init__(device)

    def _arguments(self, device: str, gpus: int) -> list[str]:
        """Command-line arguments of the keeper, after its directory and its socket."""
        return [device, "0", json.dumps(self.wanted)]

    def _environment(self, device: str) -> dict[str, str]:
        """Environment of the keeper; what Ray needs in it is the user's own."""
        return os.environ | client.actors_environment(device, self.stack, self.directory)

    def _join(self, address: str) -> None:
        """Connect with the token that is the user's own."""
        self._reserved = json.loads(address)
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        client.connect_ray(self._reserved["address"], namespace(self.stack), joins=True)
        self._connected = self._was_connected = True

    def _refused(self) -> KitError | None:
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = read_json(self.directory / REFUSED)
            return StackError(said["what"], why=said["why"], fix=said["fix"])
        return None

    def placement(self, layout: Layout, device: str) -> JoinedPlacement:
        """Placement of actors; available after `connect`."""
        bundles = [Bundle(**row) for row in self._reserved["bundles"]]
        return JoinedPlacement(self, layout, device, bundles)

    def log_tail(self) -> str:
        """The last lines of the keeper's log, and where those of the actors are."""
        text = super().log_tail()
        if self._connected:
            text += f"\nRay keeps the actors' logs in {self._reserved['logs']} on their nodes."
        return text.strip()

    def head_members(self) -> list[int | Elsewhere]:
        """The keeper, and the cluster's control service."""
        return [self._head.pid, ControlService(self._reserved["address"])]


def start_cluster(device: str, address: str | None, layout: Layout, gpus: int) -> Cluster:
    """Start the first process of a stack: a Ray head, or the keeper of a share of another cluster.

    Args:
        device: `cpu` or `cuda`.
        address: of the cluster to join; None starts a head.
        layout: for the devices to reserve in a cluster.
        gpus: of this machine, of which a head is told.
    """
    if address is None:
        return Cluster(device, gpus)
    return JoinedCluster(device, address, layout.count, len(layout.engines[0]))


def take_cluster(entry: Entry) -> Cluster:
    """Drive a cluster that lives and that nobody drives.

    Raises:
        StackError: somebody drives it, or it has ended.
    """
    return (JoinedCluster if entry.address else Cluster).taken(entry)


class JoinedPlacement(Placement):
    """Actors in the bundles of a placement group, each of which has a device."""

    def __init__(
        self, cluster: JoinedCluster, layout: Layout, device: str, bundles: Sequence[Bundle]
    ) -> None:
        """`bundles`: of the cluster's placement group, in the order of the layout's devices."""
        import ray
        from ray.util import get_placement_group

        super().__init__(layout, device, cluster.directory)
        self._group = get_placement_group(namespace(cluster.stack))
        self._bundles, self._node = bundles, ray.get_runtime_context().get_node_id()
        self._environment = client.actors_environment(device, cluster.stack, cluster.directory)
        self._all_here = all(bundle.node == self._node for bundle in bundles)

    def options(self, place: int) -> dict[str, Any]:
        """Ray's options of an actor in this bundle."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        return {
            "scheduling_strategy": PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._bundles[place].index
            ),
            "runtime_env": {"env_vars": self._environment},
        }

    def visible_devices(self, places: Sequence[int]) -> str:
        """CUDA_VISIBLE_DEVICES of an actor in these bundles."""
        return ",".join(self._bundles[place].card for place in places)

    def rendezvous(self, name: str) -> str:
        """A file where all ranks are on this machine; else a port of the first rank's node."""
        if self._all_here:
            return super().rendezvous(name)
        import ray

        port = ray.remote(num_cpus=0)(_free_port).options(**self.options(0)).remote()
        return f"tcp://{self._bundles[0].host}:{ray.get(port)}"

    @property
    def address(self) -> str:
        """Address at which engines reach rank 0 for a broadcast of its weights."""
        return LOOPBACK if self._all_here else self._bundles[0].host

    def members(self, actor: Any, place: int, pids: Sequence[int]) -> list[int | Elsewhere]:
        """Processes of an actor on the client's machine; elsewhere, the actor itself."""
        return [*pids] if self._bundles[place].node == self._node else [RemoteActor(actor)]


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


class ControlService(Elsewhere):
    """Control service of a joined cluster; without it, Ray ends the notebook's process."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._where = host, int(port)

    def lives(self) -> bool:
        """Whether it accepts a connection."""
        return can_be_reached(*self._where)

    def end(self) -> None:
        """Do nothing: the control service is not ours to end."""


class RemoteActor(Elsewhere):
    """An actor on another node, whose processes cannot be seen from here."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def lives(self) -> bool:
        """Whether Ray reports the actor as alive."""
        with suppress(Exception):
            return client.actor_state(self._actor) not in ("DEAD", "")
        return True  # Ray itself is looked at elsewhere

    def end(self) -> None:
        """Kill the actor through Ray."""
        import ray

        with suppress(Exception):
            ray.kill(self._actor)


def namespace(stack: str) -> str:
    """Ray namespace of the actors, and name of the placement group."""
    return f"kit-{stack}"


def can_be_reached(host: str, port: int) -> bool:
    """Whether an address accepts a connection."""
    with suppress(OSError), socket.create_connection((host, port), timeout=CONNECT_SECONDS):
        return True
    return False


def hold(directory: Path, stack: str, device: str, wanted: dict[str, Any]) -> Callable[[], None]:
    """Reserve the devices (in the keeper), write it to a file, and return what releases them.

    Raises:
        StackError: they cannot be had; a file says why.
    """
    try:
        reserved, give_back = _reserve(stack, device, **wanted)
    except KitError as error:
        refusal = {"what": error.what, "why": error.why, "fix": error.fix}
        replace_file(directory / REFUSED, json.dumps(refusal))
        raise
    replace_file(directory / "address", json.dumps(reserved))
    return give_back


def _reserve(
    stack: str, device: str, address: str, bundles: int, width: int
) -> tuple[dict[str, Any], Callable[[], None]]:
    import ray
    from ray.util import placement_group, remove_placement_group

    where = _resolved(address)
    _connect(where, stack)
    what = "GPU" if device == "cuda" else "CPU"
    total, free = (
        int(resources().get(what, 0))
        for resources in (ray.cluster_resources, ray.available_resources)
    )
    if free < bundles:
        raise StackError(
            f"The session takes {bundles} {what}s of the Ray cluster at {where}, of which {free} "
            f"of {total} are free.",
            why="" if total < bundles else "The others belong to other work on the cluster.",
            fix="lower training.num_trainers, engine.replicas or engine.tensor_parallel; or set "
            "cluster.colocate: true, with which trainers and engines share devices"
            + ("." if total < bundles else "; or wait until more are free."),
        )
    each = {"CPU": 1} | ({"GPU": 1} if what == "GPU" else {})
    # Not detached: it goes with this process, in whichever way that ends.
    group = placement_group([each] * bundles, strategy="PACK", name=namespace(stack))
    if not group.wait(timeout_seconds=60):
        remove_placement_group(group)
        raise StackError(
            f"The Ray cluster at {where} did not reserve {bundles} devices within 60 s.",
            why=f"Each takes {each}; {free} {what}s were free before.",
            fix="look at `ray status`; nodes need a free CPU core for each GPU.",
        )
    found = sorted(_bundles(group, what), key=lambda b: (b["host"], b["card"], b["index"]))
    if any(len({b["node"] for b in found[i : i + width]}) > 1 for i in range(0, bundles, width)):
        remove_placement_group(group)
        raise StackError(
            f"The Ray cluster at {where} has no {width} free GPUs on one node for each engine.",
            why="The devices of a tensor-parallel engine have to be in one machine.",
            fix="lower engine.tensor_parallel, or wait until a node is free.",
        )
    logs = str(client.session_directory() / "logs")
    return {"address": where, "bundles": found, "logs": logs}, lambda: remove_placement_group(group)


def _bundles(group: Any, what: str) -> list[dict[str, Any]]:
    import ray
    from ray.util import placement_group_table
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    hosts = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    nodes = placement_group_table(group)["bundles_to_node_id"]
    cards = dict.fromkeys(nodes, "")
    if what == "GPU":
        look = ray.remote(num_cpus=0, num_gpus=1)(_card)
        asked = {
            index: look.options(
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=index
                )
            ).remote()
            for index in nodes
        }
        cards = dict(zip(asked, ray.get(list(asked.values())), strict=True))
    return [
        {"index": index, "node": node, "host": hosts[node], "card": cards[index]}
        for index, node in nodes.items()
    ]


def _card() -> str:
    import ray

    return str(ray.get_gpu_ids()[0])


def _resolved(address: str) -> str:
    """Resolve an address to HOST:PORT. Raises StackError if nothing listens there."""
    where = address
    if address == "auto":
        where = os.environ.get("RAY_ADDRESS") or client.local_cluster() or ""
        if not where:
            raise StackError(
                "cluster.address is auto, and no Ray cluster runs on this machine.",
                fix="start one (`ray start --head`), give its HOST:PORT, or leave cluster.address "
                "out: the session then starts a head of its own.",
            )
    host, _, port = where.rpartition(":")
    if not (host and port.isdecimal() and can_be_reached(host, int(port))):
        raise StackError(
            f"There is no Ray cluster at {where!r}.",
            why="Nothing answers there." if host and port.isdecimal() else "HOST:PORT is needed.",
            fix="take the address that `ray start --head` printed; `ray status` looks whether it "
            "lives. Without cluster.address the session starts a head of its own.",
        )
    return where


def _connect(where: str, stack: str) -> None:
    import ray

    try:
        ray.init(
            address=where, namespace=namespace(stack), log_to_driver=False, logging_level="ERROR"
        )
    except Exception as error:
        said = str(error)
        if "ersion mismatch" in said:
            fix = "run the notebook with the Ray and the Python that the cluster has."
        else:  # of a wrong token Ray says no more than that it could not connect
            fix = (
                "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the "
                "cluster's before the kernel starts, as for `ray status`; and see that this "
                "machine is one of its nodes: `ray start --address=...`."
            )
        why = "\n".join(said.strip().splitlines()[:6])
        raise StackError(
            f"The Ray cluster at {where} cannot be joined.", why=why, fix=fix
        ) from None
