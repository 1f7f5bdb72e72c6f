"""`JoinedCluster`: a placement group on a Ray cluster that others run, instead of a head of ours.

    client ── own, leave, end, silence ──► keeper (kit.stack.head, on the client's machine)
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
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.cluster import client as own
from kit.cluster.client import Cluster
from kit.cluster.placement import JoinedPlacement
from kit.cluster.processes import Elsewhere
from kit.errors import KitError, StackError
from kit.utils.files import replace_file
from kit.utils.imports import import_ray

if TYPE_CHECKING:
    from kit.stack.stack import Stack


REFUSED = "refused"
"""A file in which the keeper says why there is no placement group."""


SECONDS = 3.0
"""In which a cluster's control service has to let itself be reached."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """One device of the placement group."""

    index: int
    """In the group."""
    node: str
    """Ray's id of the node."""
    host: str
    """That node's address."""
    card: str
    """Of a GPU: its number on the node, as in CUDA_VISIBLE_DEVICES; empty on a CPU."""


class JoinedCluster(Cluster):
    """A share of somebody else's Ray cluster, held by a process of our own."""

    def _arguments(self, device: str, gpus: int) -> list[str]:
        """Of the keeper."""
        return [device, "0", json.dumps(self.wanted)]

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

    def _environment(self, device: str) -> dict[str, str]:
        """The keeper's: what Ray needs is the user's own."""
        return os.environ | own.actors_environment(device, self.stack, self.directory)

    @property
    def actors_environment(self) -> dict[str, str]:
        """What actors find in their environment."""
        return own.actors_environment(self.entry.device, self.stack, self.directory)

    def _join(self, address: str) -> None:
        """With the token that is the user's own."""
        self._reserved = json.loads(address)
        import_ray()
        import ray
        from ray._private import ray_constants, worker
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        self._refuse_a_second_connection()
        os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
        ray_constants.ENABLE_RAY_CLUSTER = True
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init(
            address=self._reserved["address"],
            namespace=namespace(self.stack),
            log_to_driver=False,
            logging_level="ERROR",
        )
        self._connected = self._was_connected = True
        worker.print_to_stdstream = lambda *_, **__: None

    def _refused(self) -> KitError | None:
        with suppress(OSError, ValueError):
            said = json.loads((self.directory / REFUSED).read_text())
            return StackError(said["what"], why=said["why"], fix=said["fix"])
        return None

    def placement(self, stack: Stack) -> JoinedPlacement:
        """Where actors run; there once `connect` is done."""
        import ray
        from ray.util import get_placement_group

        bundles = [Bundle(**row) for row in self._reserved["bundles"]]
        group = get_placement_group(namespace(self.stack))
        return JoinedPlacement(stack, group, bundles, ray.get_runtime_context().get_node_id())

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the keeper's log, and where those of the actors are."""
        text = super().log_tail(lines)
        if self._connected:
            text += f"\nRay keeps the actors' logs in {self._reserved['logs']} on their nodes."
        return text.strip()

    def head_members(self) -> list[int | Elsewhere]:
        """The keeper, and the cluster's control service."""
        return [self._head.pid, ControlService(self._reserved["address"])]


class ControlService(Elsewhere):
    """A cluster's own control service: to use Ray without it ends the notebook's process."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._where = host, int(port)

    def lives(self) -> bool:
        """Does it take a connection?"""
        return can_be_reached(*self._where)

    def end(self) -> None:
        """It is not ours to end."""


class RemoteActor(Elsewhere):
    """An actor on another node, whose processes cannot be seen from here."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def lives(self) -> bool:
        """As far as Ray knows."""
        from ray._private.state import actors

        with suppress(Exception):
            state = actors(self._actor._actor_id.hex()).get("State", "")
            return state not in ("DEAD", "")
        return True  # Ray itself is looked at elsewhere

    def end(self) -> None:
        """Have Ray kill it."""
        import ray

        with suppress(Exception):
            ray.kill(self._actor)


def namespace(stack: str) -> str:
    """Of the actors, and the name of the placement group."""
    return f"kit-{stack}"


def can_be_reached(host: str, port: int) -> bool:
    """Does anything listen there?"""
    with suppress(OSError), socket.create_connection((host, port), timeout=SECONDS):
        return True
    return False


def hold(directory: Path, stack: str, device: str, wanted: dict[str, Any]) -> Callable[[], None]:
    """The keeper's side: reserve the devices, say so in a file, and return what gives them back.

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

    where = _found(address)
    _connect(where, stack)
    what = "GPU" if device == "cuda" else "CPU"
    total, free = (
        int(resources().get(what, 0)) for resources in (ray.cluster_resources, _free_soon)
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
    logs = str(Path(ray._private.worker._global_node.get_session_dir_path()) / "logs")
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


def _free_soon() -> dict[str, float]:
    import ray

    free: dict[str, float] = ray.available_resources()
    return free


def _found(address: str) -> str:
    """HOST:PORT of the cluster. Raises StackError where nothing is there."""
    where = address
    if address == "auto":
        from ray._private import services, utils

        where = os.environ.get("RAY_ADDRESS") or services.read_ray_address(utils.get_ray_temp_dir())
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
