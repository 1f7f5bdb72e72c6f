"""`Sends`: the part of a trainer that hands weights to engines, through memory or by broadcast."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from kit.models.policy import Policy
from kit.models.state_dict import as_saved
from kit.trainer.fsdp import whole
from kit.trainer.offload import DeviceMemory
from kit.trainer.settings import TrainerSettings
from kit.weight_sync.transform import EXACT, HandedOver
from kit.weight_sync.transport import BACKENDS, Handle, Outbox, Parcel

store: Any = dist  # it names its stores in no way that a type checker can read


class Sends:
    """Gathers weights from all ranks, bucket by bucket, and has engines get them."""

    settings: TrainerSettings
    device: torch.device
    policy: Policy
    memory: DeviceMemory
    outbox: Outbox
    updates: int
    handed_over: HandedOver
    _buckets: list[list[str]]
    _listening: Any = None
    """The store through which engines find rank 0, while they look for it."""
    _group: Any = None
    """Rank 0 and all ranks of all engines."""

    def export_weights(
        self, version: int = 0, exact: bool = False, bucket: int = 0, *_: Any
    ) -> Handle | None:
        """Gather a bucket of the weights; a rank that feeds an engine returns where they are.

        Args:
            version: which weights they are.
            exact: without the disturbance.
            bucket: which one; with one trainer on a CPU there is only the first.
            _: answers that Ray has to have before this call may begin.
        """
        if bucket == 0:
            disturbance = EXACT if exact else self.settings.disturbance
            self.handed_over = HandedOver(disturbance, self.updates)
        wanted = set(self._buckets[bucket])
        with torch.no_grad():
            named = (
                entry
                for name, value in self.handed_over_parameters()
                if name in wanted
                for entry in as_saved(name, self.handed_over.as_engine_has(name, whole(value)))
            )
            if self.settings.feeds:
                with self.memory.whole_blocks():
                    return self.outbox.fill(named, bucket)
            for _name in named:  # gathering takes all ranks
                pass
        return None

    def handed_over_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the engine is given; a tied output embedding is part of it once."""
        inner: Any = self.policy.model
        tied = inner.config.tie_word_embeddings
        for name, value in inner.named_parameters():
            if not (tied and name == "lm_head.weight"):
                yield name, value

    # ---- by broadcast --------------------------------------------------------------------------

    def parcels(self) -> list[Parcel]:
        """What each bucket will carry."""
        dtype = self.outbox.dtype
        shapes = {name: value.shape for name, value in self.handed_over_parameters()}
        found = []
        for names in self._buckets:
            rows = [
                (saved, list(part.shape), part.numel() * dtype.itemsize)
                for name in names
                for saved, part in as_saved(name, torch.empty(shapes[name], device="meta"))
            ]
            dtypes = [str(dtype).removeprefix("torch.")] * len(rows)
            found.append(
                Parcel([r[0] for r in rows], dtypes, [r[1] for r in rows], sum(r[2] for r in rows))
            )
        return found

    def listen(self, host: str, world: int) -> int:
        """Rank 0: be found by engines at a port of this address, which is the answer.

        Args:
            host: an address of this machine; nothing listens on any other.
            world: how many will meet.
        """
        listener = socket.create_server((host, 0))
        port: int = listener.getsockname()[1]
        self._listening = store.TCPStore(
            host,
            port,
            world,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return port

    def meet_engines(self, name: str, world: int) -> None:
        """Rank 0: wait until all engines have joined the group of this name."""
        from sglang.srt.utils.common import init_custom_process_group

        self._group = init_custom_process_group(
            backend=BACKENDS[self.device.type],
            store=store.PrefixStore(name, self._listening),
            world_size=world,
            rank=0,
            group_name=name,
        )

    def leave_engines(self) -> None:
        """Rank 0: the group is of no use any more."""
        if self._group is not None:
            self._group.abort()
            dist.destroy_process_group(self._group)
        self._group = self._listening = None

    def broadcast_weights(
        self, version: int, exact: bool, bucket: int, give_up: str, *_: Any
    ) -> bool:
        """Gather a bucket of the weights, and have rank 0 send it to all engines: were they sent?

        Args:
            version: which weights they are.
            exact: without the disturbance.
            bucket: which one.
            give_up: a file; once it is there, an engine is gone and nobody has to wait for it.
            _: answers that Ray has to have before this call may begin.
        """
        handle = self.export_weights(version, exact, bucket)
        if handle is None:
            return True
        flat = self.outbox.flat(bucket, handle.size)
        try:
            work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
            while work is not None and not work.is_completed():
                if os.path.exists(give_up):
                    self.leave_engines()
                    return False
                time.sleep(0.0005)
            if work is not None:
                work.wait()
        except RuntimeError:  # an engine is gone, which its own call tells
            self.leave_engines()
            return False
        return True
