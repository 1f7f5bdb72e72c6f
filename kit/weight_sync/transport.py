"""Buckets of weights, and the buffers in which they travel without a file or a copy through Ray.

On a CPU the trainer writes them into an anonymous memory file that the engine maps; the file has
no name, so it cannot outlive its two processes. On a GPU they travel in buckets of bounded size,
each a buffer of the trainer's that the engine opens through CUDA IPC; there are two, so that one is
filled while the other is read. Either way SGLang receives flat tensors and tables of what lies
where.

Each tensor has a dtype of its own. Within a bucket the widest come first, so that every tensor is
aligned without padding: SGLang packs what is broadcast to it in the same way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from kit.errors import StackError

POLICY = "policy"
"""The name under which the weights that are trained travel."""
ADAPTER = "adapter"
"""The name under which adapters travel, where engines have them beside the policy's weights."""
DRAFT = "draft"
"""The name under which the weights of a draft travel."""
SLOTS = 2
"""Buffers of a GPU's trainer: one is filled while the engine reads the other."""
COPIED_AT_ONCE = 64 << 20
"""Bytes that are copied into a buffer in one go."""
BACKENDS = {"cpu": "gloo", "cuda": "nccl"}
DtypeOf = Callable[[str], torch.dtype]
"""The dtype in which the engine gets the tensor of this checkpoint name."""


def unknown_model(side: str, model: str, known: Iterable[str]) -> StackError:
    """Error of a sync that names a model which one side does not have."""
    return StackError(
        f"A sync is to carry weights of a model named {model!r}, which the {side} does not have.",
        why=f"The {side} has those of: {', '.join(sorted(known)) or 'no model yet'}.",
        fix="sync one of these, or register the model with both the trainer's `WeightSender` and "
        "the engine's `WeightReceiver`.",
    )


def in_buckets(sizes: Iterable[tuple[str, int]], limit: int) -> list[list[str]]:
    """Names, given as (name, bytes), in buckets of at most `limit` bytes; a larger one is alone."""
    buckets: list[list[str]] = []
    room = 0
    for name, size in sizes:
        if size > room or not buckets:
            buckets.append([])
            room = limit
        buckets[-1].append(name)
        room -= size
    return buckets


class Entry(NamedTuple):
    """A tensor in the flat buffer; `start` and `end` are bytes.

    A tuple, as hundreds of them are pickled at each sync.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    end: int

    def view(self, flat: torch.Tensor) -> torch.Tensor:
        """The tensor in a flat buffer of bytes; it shares the buffer's memory."""
        return flat[self.start : self.end].view(getattr(torch, self.dtype)).view(self.shape)


@dataclass(frozen=True, slots=True)
class BucketSpec:
    """Contents of one bucket."""

    model: str
    """Whose weights they are, such as `policy`."""
    entries: tuple[Entry, ...]

    @classmethod
    def of(
        cls, model: str, tensors: Iterable[tuple[str, tuple[int, ...]]], dtype_of: DtypeOf
    ) -> BucketSpec:
        """Lay out tensors, given as (name, shape), one after the other, the widest dtype first."""
        rows = [(name, shape, dtype_of(name)) for name, shape in tensors]
        rows.sort(key=lambda row: (-row[2].itemsize, str(row[2])))
        entries, start = [], 0
        for name, shape, dtype in rows:
            end = start + torch.Size(shape).numel() * dtype.itemsize
            entries.append(Entry(name, shape, str(dtype).removeprefix("torch."), start, end))
            start = end
        return cls(model, tuple(entries))

    @property
    def count(self) -> int:
        """Tensors that it carries."""
        return len(self.entries)

    @property
    def size(self) -> int:
        """Bytes of the flat buffer."""
        return self.entries[-1].end if self.entries else 0


@dataclass(frozen=True, slots=True)
class Handle(BucketSpec):
    """A bucket in a buffer: everything another process needs to see the weights.

    On a GPU the table of tensors is part of `ipc`, and `entries` are left out.
    """

    tensors: int = 0
    """How many it carries."""
    nbytes: int = 0
    """Size of the flat buffer."""
    path: str = ""
    """CPU: where the memory file can be opened."""
    ipc: bytes = b""
    """GPU: the flat tensor, as a CUDA IPC handle, and its table, serialised as SGLang does it."""

    @property
    def count(self) -> int:
        """Tensors that it carries, listed or not."""
        return self.tensors

    @property
    def size(self) -> int:
        """Bytes of the flat buffer."""
        return self.nbytes


@dataclass(slots=True)
class SendBuffer:
    """The trainer's side: buffers that live as long as the trainer, filled anew at each sync."""

    device: torch.device
    shared: bool = True
    """Whether engines read the buffers; otherwise they are broadcast."""
    _buffers: dict[int, torch.Tensor] = field(default_factory=dict)
    _places: dict[int, tuple[BucketSpec, dict[str, torch.Tensor]]] = field(default_factory=dict)
    """By slot: the bucket that was last in it, and where each of its tensors lies."""
    _memory_file: int = field(default=-1)

    def reserve(self, spec: BucketSpec, bucket: int = 0, others: Sequence[BucketSpec] = ()) -> None:
        """Make the buffer of a bucket, if it is not there.

        On a GPU it is made for the largest of the buckets that take turns in it: a buffer for each
        would leave its predecessors' memory with the process.

        Args:
            spec: of the bucket.
            bucket: its number.
            others: all buckets of the model.
        """
        slot = self._slot(bucket)
        largest = max((each.size for each in others[slot::SLOTS]), default=0)
        room = max(spec.size, largest) if self.device.type == "cuda" else spec.size
        buffer = self._buffer(slot, room)
        if self._places.get(slot, (None,))[0] is not spec:
            self._places[slot] = spec, {entry.name: entry.view(buffer) for entry in spec.entries}

    @torch.no_grad()
    def fill(
        self, spec: BucketSpec, named: Iterable[tuple[str, torch.Tensor]], bucket: int = 0
    ) -> Handle:
        """Copy the tensors into a buffer, laid out and converted as the spec says.

        They may be made one after the other: few of them are held at a time.

        Raises:
            ValueError: one of the spec's is not among them.
        """
        self.reserve(spec, bucket)
        slot = self._slot(bucket)
        places, buffer = dict(self._places[slot][1]), self._buffers[slot]
        waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
        size = 0
        for name, value in named:
            waiting.append((places.pop(name), value))
            size += waiting[-1][0].nbytes
            if size >= COPIED_AT_ONCE:
                _copy(waiting)
                waiting, size = [], 0
        _copy(waiting)
        if places:
            raise ValueError(f"a bucket lacks {len(places)} tensors, {next(iter(places))} for one")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            ipc = serialize(buffer[: spec.size], spec) if self.shared else b""
            return Handle(spec.model, (), len(spec.entries), spec.size, ipc=ipc)
        path = f"/proc/{os.getpid()}/fd/{self._memory_file}"
        return Handle(spec.model, spec.entries, len(spec.entries), spec.size, path)

    def flat(self, bucket: int, size: int) -> torch.Tensor:
        """The bytes that the last `fill` of this bucket has written."""
        return self._buffers[self._slot(bucket)][:size]

    def _slot(self, bucket: int) -> int:
        return bucket % SLOTS if self.device.type == "cuda" else 0

    def _buffer(self, slot: int, size: int) -> torch.Tensor:
        buffer = self._buffers.get(slot)
        if self.device.type == "cuda":
            if buffer is None or buffer.numel() < size:
                self._places.pop(slot, None)
                buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        elif buffer is None or buffer.numel() != size:
            self._places.pop(slot, None)
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
            self._places.clear()
            self._buffers.clear()


def _copy(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy into (place, value), those of a dtype in one call; of one byte as bytes."""
    by_dtype: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for place, value in pairs:
        if place.itemsize == 1 and place.dtype is value.dtype:
            place, value = place.view(torch.uint8), value.view(torch.uint8)
        into, values = by_dtype.setdefault(place.dtype, ([], []))
        into.append(place)
        values.append(value)
    for into, values in by_dtype.values():
        torch._foreach_copy_(into, values)


@dataclass(slots=True)
class ReceiveBuffer:
    """The engine's side on a CPU: a tensor that SGLang's processes can map, refilled each sync.

    Not the trainer's own buffer, because torch hands a tensor on to another process only where it
    has made the memory itself; and one for all syncs, because fresh memory is what takes the time.
    """

    flat: torch.Tensor | None = None
    _source: tuple[str, int] = ("", 0)
    _mapped: torch.Tensor | None = None

    def receive(self, handle: Handle) -> torch.Tensor:
        """Open the trainer's buffer as one shared tensor of bytes."""
        source = (handle.path, handle.size)
        if self.flat is None or self._mapped is None or self._source != source:
            self._source = source
            self._mapped = torch.from_file(
                handle.path, shared=True, size=handle.size, dtype=torch.uint8
            )
            self.flat = torch.empty(handle.size, dtype=torch.uint8).share_memory_()
        return self.flat.copy_(self._mapped)


@lru_cache(maxsize=8)
def table_of(spec: BucketSpec) -> bytes:
    """A bucket's table as JSON: a list with name, shape, dtype, start and end of each tensor."""
    return json.dumps(spec.entries).encode()


def serialize(flat: torch.Tensor, spec: BucketSpec) -> bytes:
    """A flat buffer in the form that SGLang's `flattened_bucket` loader reads.

    Adapters are in the kit's own form, which `kit.engine.adapters` reads.
    """
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorMetadata

    if flat.is_cuda:
        monkey_patch_torch_reductions()  # names the card by its UUID, not by its local number
    if spec.model == ADAPTER:
        told = {"flat": flat, "table": table_of(spec)}
        own: bytes = MultiprocessingSerializer.serialize(told)
        return own
    metadata: list[Any] = [
        FlattenedTensorMetadata(
            name=entry.name,
            shape=torch.Size(entry.shape),
            dtype=getattr(torch, entry.dtype),
            start_idx=entry.start,
            end_idx=entry.end,
            numel=entry.end - entry.start,
        )
        for entry in spec.entries
    ]
    payload: bytes = MultiprocessingSerializer.serialize(
        {"flattened_tensor": flat, "metadata": metadata}
    )
    return payload
