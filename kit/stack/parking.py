"""`Parking`: host memory in which a trainer's tensors wait while the engine has the device.

A tensor keeps its identity: its storage shrinks to nothing and grows again, so that models and
optimizers that hold it need not know. The host's side is page-locked, where there is a GPU, and
made once: locking it takes longer than all copies of a session.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch.distributed.tensor import DTensor

ALIGNED = 512
"""Bytes at whose multiples each tensor begins on the host."""


@dataclass(slots=True)
class Parking:
    """Takes tensors off a device and brings them back, bit by bit the same."""

    device: torch.device
    _host: torch.Tensor | None = None
    _places: list[tuple[torch.UntypedStorage, int, int]] = field(default_factory=list)
    """(storage, its size in bytes, where it waits)."""

    @property
    def taken(self) -> int:
        """Bytes that wait on the host now; 0 while everything is on the device."""
        return sum(size for _, size, _ in self._places)

    def take(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy these to the host and free their memory on the device."""
        storages = {}
        for tensor in tensors:
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            storage = own.detach().untyped_storage()
            # Memory that is a file's, as a host may have it, is not ours to give back.
            if storage.device == self.device and storage.nbytes() and storage.resizable():
                storages[storage.data_ptr()] = storage
        start = 0
        for storage in storages.values():
            self._places.append((storage, storage.nbytes(), start))
            start += -(-storage.nbytes() // ALIGNED) * ALIGNED
        host = self._room(start)
        for storage, size, place in self._places:
            host[place : place + size].copy_(_as_bytes(storage), non_blocking=True)
        self._wait()
        for storage, _, _ in self._places:
            storage.resize_(0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def give_back(self) -> None:
        """Bring everything back that was taken."""
        for storage, size, place in self._places:
            assert self._host is not None
            storage.resize_(size)
            _as_bytes(storage).copy_(self._host[place : place + size], non_blocking=True)
        self._wait()
        self._places.clear()

    def reserve(self, size: int) -> None:
        """Have so many bytes of host memory ready."""
        self._room(size)

    def _room(self, size: int) -> torch.Tensor:
        if self._host is None or self._host.numel() < size:
            self._host = None  # first, or both would be there for a moment
            locked = self.device.type == "cuda"
            self._host = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        return self._host

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
