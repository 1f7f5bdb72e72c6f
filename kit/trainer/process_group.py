"""`Meets`: the part of a trainer that finds the other ranks, leaves them, and finds them again."""

from __future__ import annotations

import gc
import os
import socket
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from kit.trainer.settings import TrainerSettings
from kit.trainer.state import TrainerSnapshot

if TYPE_CHECKING:
    from kit.trainer.actor import Trainer


LOOPBACK = "lo"


def _sockets() -> set[tuple[int, str]]:
    """(file descriptor, identity) of each that this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            identity = os.readlink(f"/proc/self/fd/{name}")
            if identity.startswith("socket:"):
                found.add((int(name), identity))
    return found


class Meets:
    """One rank's place in the group of all ranks."""

    settings: TrainerSettings
    mesh: Any
    _lines: set[tuple[int, str]]
    """Sockets to the other ranks."""

    def _meet(self) -> None:
        """Wait for the other ranks."""
        settings = self.settings
        if settings.meeting.startswith("file:"):
            os.environ["GLOO_SOCKET_IFNAME"] = LOOPBACK  # else it asks for the host's name
        others = _sockets()
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if settings.device == "cuda" else "gloo",
            init_method=settings.meeting,
            rank=settings.rank,
            world_size=settings.training.num_trainers,
        )
        self.mesh = init_device_mesh(settings.device, (settings.training.num_trainers,))
        self._lines = _sockets() - others

    def leave_group(self) -> None:
        """Let the ranks fail that wait for this one, and this one where it waits for them.

        Gloo's own `abort` lets nobody go that waits already; a line that is cut does.
        """
        for line in self._lines & _sockets():
            with suppress(OSError), socket.socket(fileno=os.dup(line[0])) as one:
                one.getpeername()  # raises for what only listens: without it gloo ends the process
                one.shutdown(socket.SHUT_RDWR)
        if self.settings.device == "cuda":
            groups: list[Any] = list(dist.distributed_c10d._world.pg_map)
            for group in groups:
                group._get_backend(torch.device("cuda")).abort()

    def regroup(self, rendezvous: str) -> None:
        """Meet again after a group was left; weights, optimizer and counters stay as they are.

        Args:
            rendezvous: a new place to meet.
        """
        trainer = cast("Trainer", self)
        trainer._give_up()
        kept = TrainerSnapshot.of(trainer)  # this rank's share, for which it needs no other
        del trainer.policy, trainer.reference, trainer.critic, trainer.optimizer, self.mesh
        trainer.weights.forget_engines()
        gc.collect()  # sharded models are held by cycles
        dist.destroy_process_group()
        self.settings = replace(self.settings, rendezvous=rendezvous)
        self._meet()
        trainer.settle()
        trainer._load()
        trainer.place()
        kept.put_back(trainer)
