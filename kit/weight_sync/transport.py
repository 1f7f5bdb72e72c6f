"""How weights are divided on their way to the engine; nothing here needs torch.

Weights from the trainer to the engine, without a file and without a copy through Ray.

On a CPU the trainer writes them into an anonymous memory file that the engine maps; the file has
no name, so it cannot outlive its two processes. On a GPU they travel in buckets of bounded size,
each a buffer of the trainer's that the engine opens through CUDA IPC; there are two, so that one is
filled while the other is read. Either way SGLang receives flat tensors and tables of what lies
where.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

SLOTS = 2
"""Buffers of a GPU's trainer: one is filled while the engine reads the other."""


def in_buckets(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names, in order, in buckets of at most `limit` bytes; what is larger is alone.

    Args:
        sizes: (name, bytes).
        limit: bytes.
    """
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if size > room or not buckets:
            buckets.append([])
            room = limit
        buckets[-1].append(name)
        room -= size
    return buckets


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor in the flat buffer; `start` and `end` are bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Handle:
    """Everything another process needs to see the weights."""

    entries: tuple[Entry, ...]
    size: int
    """Of the flat buffer, in bytes."""
    path: str = ""
    """CPU: where the memory file can be opened."""
    ipc: bytes = b""
    """GPU: SGLang's own serialisation of the flat tensor, a CUDA IPC handle."""


@dataclass(slots=True)
class Outbox:
    """The trainer's side: buffers that live as long as the trainer, filled anew at each sync."""

    device: torch.device
    dtype: torch.dtype
    shared: bool = True
    """Do engines read the buffers? Else they are sent."""
    _buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    _memory_file: int = field(default=-1)

    @torch.no_grad()
    def fill(self, named: Iterable[tuple[str, torch.Tensor]], bucket: int = 0) -> Handle:
        """Copy the tensors into a buffer, in the engine's dtype, and describe them."""
        tensors = list(named)
        width = torch.empty((), dtype=self.dtype).element_size()
        total = sum(t.numel() for _, t in tensors) * width
        buffer = self._buffer(self._slot(bucket), total)
        entries, places, start = [], [], 0
        for name, tensor in tensors:
            end = start + tensor.numel() * width
            places.append(buffer[start:end].view(self.dtype).view(tensor.shape))
            dtype = str(self.dtype).removeprefix("torch.")
            entries.append(Entry(name, tuple(tensor.shape), dtype, start, end))
            start = end
        torch._foreach_copy_(places, [tensor for _, tensor in tensors])
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            ipc = serialize(buffer[:total], entries) if self.shared else b""
            return Handle(tuple(entries), total, ipc=ipc)
        path = f"/proc/{os.getpid()}/fd/{self._memory_file}"
        return Handle(tuple(entries), total, path=path)

    def flat(self, bucket: int, size: int) -> torch.Tensor:
        """The bytes that the last `fill` of this bucket has written."""
        return self._buffers[self._slot(bucket)][:size]

    def _slot(self, bucket: int) -> int:
        return bucket % SLOTS if self.device.type == "cuda" else 0

    def _buffer(self, slot: int, size: int) -> torch.Tensor:
        buffer = self._buffers.get(slot)
        if self.device.type == "cuda":
            if buffer is None or buffer.numel() < size:
                buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        elif buffer is None or buffer.numel() != size:
            if self._memory_file >= 0:
                os.close(self._memory_file)
            self._memory_file = os.memfd_create("kit-weights")
            os.ftruncate(self._memory_file, size)
            path = f"/proc/self/fd/{self._memory_file}"
            buffer = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        self._buffers[slot] = buffer
        return buffer

    def empty(self) -> None:
        """Let go of a GPU's buffers."""
        if self.device.type == "cuda":
            self._buffers.clear()


@dataclass(slots=True)
class Inbox:
    """The engine's side on a CPU: a tensor that SGLang's processes can map, refilled each sync.

    Not the trainer's own buffer, because torch hands a tensor on to another process only where it
    has made the memory itself; and one for all syncs, because fresh memory is what takes the time.
    """

    flat: torch.Tensor | None = None
    _from: tuple[str, int] = ("", 0)
    _theirs: torch.Tensor | None = None

    def receive(self, handle: Handle) -> torch.Tensor:
        """What is in the trainer's buffer now, as one shared tensor of bytes."""
        if self.flat is None or self._theirs is None or self._from != (handle.path, handle.size):
            self._from = (handle.path, handle.size)
            self._theirs = torch.from_file(
                handle.path, shared=True, size=handle.size, dtype=torch.uint8
            )
            self.flat = torch.empty(handle.size, dtype=torch.uint8).share_memory_()
        return self.flat.copy_(self._theirs)


def serialize(flat: torch.Tensor, entries: Iterable[Entry]) -> bytes:
    """A flat buffer in the form that SGLang's `flattened_bucket` loader reads."""
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    if flat.is_cuda:
        monkey_patch_torch_reductions()  # names the card by its UUID, not by its local number
    metadata: list[Any] = [
        FlattenedTensorMetadata(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=getattr(torch, entry.dtype),
            start_idx=entry.start,
            end_idx=entry.end,
            numel=entry.end - entry.start,
        )
        for entry in entries
    ]
    payload: bytes = MultiprocessingSerializer.serialize(
        {"flattened_tensor": flat, "metadata": metadata}
    )
    return payload


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one broadcast carries, as SGLang is told of it beforehand."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    size: int
    """Bytes."""


BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
