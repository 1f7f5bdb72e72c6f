"""`ProcessGroup`: a rank's place among all. `CancelToken`: how all of them stop together."""

from __future__ import annotations

import gc
import os
import socket
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kit.errors import StoppedError

LOOPBACK = "lo"


class ProcessGroup:
    """Joins the group of all ranks, leaves it, and joins another."""

    def __init__(self, device: str, rank: int, size: int) -> None:
        self.device, self.rank, self.size = device, rank, size
        self.mesh: Any = None
        self._connections: set[tuple[int, str]] = set()
        """Sockets to the other ranks."""

    def join(self, init_method: str) -> None:
        """Wait for the other ranks at a place that all of them know, in torch's form."""
        if init_method.startswith("file:"):
            os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK  # else it asks for the host's name
        others = _sockets()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device == "cuda" else "gloo",
            init_method=init_method,
            rank=self.rank,
            world_size=self.size,
        )
        self.mesh = init_device_mesh(self.device, (self.size,))
        self._connections = _sockets() - others

    def leave(self) -> None:
        """Let the ranks fail that wait for this one, and this one where it waits for them.

        Gloo's own `abort` does not end what waits already; a closed connection does.
        """
        for connection in self._connections & _sockets():
            with suppress(OSError), socket.socket(fileno=os.dup(connection[0])) as one:
                one.getpeername()  # raises for what only listens: without it gloo ends the process
                one.shutdown(socket.SHUT_RDWR)
        if self.device == "cuda":
            groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
            for group in groups:
                group._get_backend(torch.device("cuda")).abort()

    def rejoin(self, init_method: str) -> None:
        """Join at a new place after `leave`; nothing may be sharded over the group before."""
        self.mesh = None
        gc.collect()
        dist.destroy_process_group()
        self.join(init_method)


def _sockets() -> set[tuple[int, str]]:
    """(file descriptor, identity) of each that this process has open."""
    sockets = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            identity = os.readlink(f"/proc/self/fd/{name}")
            if identity.startswith("socket:"):
                sockets.add((int(name), identity))
    return sockets


@dataclass(frozen=True, slots=True)
class CancelToken:
    """A file whose presence stops an update between two micro-batches.

    A trainer is busy while it works and answers no call, so the client makes a file. All ranks get
    the same answer at the same boundary, or some would wait for the others for ever.
    """

    file: str | None = None
    """None is never there."""

    def check(self) -> None:
        """Raise StoppedError if the file is there; all ranks call."""
        if self.file is None:
            return
        there = os.path.exists(self.file)
        if dist.get_world_size() > 1:
            any_rank = torch.tensor([int(there)])
            dist.all_reduce(any_rank, op=dist.ReduceOp.MAX)
            there = bool(any_rank)
        if there:
            raise StoppedError(
                "The update was stopped between two micro-batches: weights and optimizer are as "
                "before it."
            )


NEVER = CancelToken()
