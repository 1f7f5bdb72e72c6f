"""A trainer's share of a device, and the host memory in which its tensors wait or are copied."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from kit.errors import StackError
from kit.models.sharding import local


@dataclass(slots=True)
class DeviceMemory:
    """A trainer's share of a device: how much it may take, and how much it took."""

    device: torch.device
    limit: int | None = None
    """Bytes that this process may take; more is an error, not a swap."""

    def __post_init__(self) -> None:
        if self.device.type == "cuda":
            _growing_segments(True)
        if self.device.type == "cuda" and self.limit is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            share = max(min(self.limit / total, 1.0), 0.01)
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    @contextmanager
    def whole_blocks(self) -> Iterator[None]:
        """For memory that another process will open: CUDA IPC takes no growing segments."""
        if self.device.type != "cuda":
            yield
            return
        _growing_segments(False)
        try:
            yield
        finally:
            _growing_segments(True)

    def release_cache(self) -> None:
        """Give back what is held but not used, and forget the peak so far."""
        forget_peak(self.device)

    def read(self) -> dict[str, int]:
        """Bytes: `used` of the device by all processes now, `held` of it by torch in this process;
        `peak` the most since the last reading, as far as this process made it; `allocated` the most
        that its tensors took. Empty on a CPU.
        """
        if self.device.type != "cuda":
            return {}
        free, total = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device)
        most = torch.cuda.max_memory_reserved(self.device)
        allocated = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        used = total - free
        return {"used": used, "held": held, "peak": used - held + most, "allocated": allocated}


def forget_peak(device: torch.device) -> None:
    """Give back what this process holds of a device but does not use; the peak begins anew."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _growing_segments(wanted: bool) -> None:
    """Segments that grow leave no gaps between micro-batches of different sizes."""
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")


@contextmanager
def out_of_memory(tokens: int, recover: Callable[[], None]) -> Iterator[None]:
    """Turn a lack of device memory into an error that says what to do; models stay usable.

    Args:
        tokens: of a micro-batch, the setting to lower.
        recover: forgets what the models were at.

    Raises:
        StackError: the device had too little memory.
    """
    message = ""
    try:
        yield
    except torch.OutOfMemoryError as error:
        message = ". ".join(str(error).split(". ")[:2])
    if not message:
        return
    # After the except block, so that nothing holds what the broken pass had made.
    recover()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise StackError(
        f"The trainer ran out of device memory with micro-batches of {tokens:,} tokens. Nothing "
        "was changed.",
        why=message,
        fix="lower training.max_tokens_per_gpu (a single longer sample is a micro-batch by "
        "itself), set model.gradient_checkpointing: true, or look at session.memory_plan().",
    )


CHUNK = 64 << 20
"""Bytes of a piece of host memory: large ones would be rounded up to a power of two."""
ALIGNED = 512
"""Bytes at whose multiples each tensor begins on the host."""


class HostBuffer:
    """Host memory that holds the bytes of a device's tensors.

    On a GPU's host it is page-locked: copies are then as fast as the bus is. Locking takes longer
    than copying, so the memory is kept for the next time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.chunks: list[torch.Tensor] = []

    def reserve(self, size: int) -> None:
        """Have memory for so many bytes ready."""
        while (left := size - sum(chunk.numel() for chunk in self.chunks)) > 0:
            if self.chunks and self.chunks[-1].numel() < CHUNK:
                left += self.chunks.pop().numel()  # only the last one may be smaller
            locked = self.device.type == "cuda"
            chunk = torch.empty(min(CHUNK, left), dtype=torch.uint8, pin_memory=locked)
            self.chunks.append(chunk)

    def store(self, parts: Sequence[torch.Tensor]) -> None:
        """Copy flat bytes into the buffer, in place of what it held."""
        self.reserve(sum(_aligned(part.numel()) for part in parts))
        for host, own in self._pairs(parts):
            host.copy_(own, non_blocking=True)
        self._wait()

    def load(self, parts: Sequence[torch.Tensor]) -> None:
        """Copy back what `store` has taken; as many bytes in the same order."""
        for host, own in self._pairs(parts):
            own.copy_(host, non_blocking=True)
        self._wait()

    def _pairs(self, parts: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Stretches of the buffer, each with the stretch of a part that belongs to it."""
        place = 0
        for part in parts:
            start, end = 0, part.numel()
            while start < end:
                chunk, offset = self.chunks[(place + start) // CHUNK], (place + start) % CHUNK
                count = min(end - start, chunk.numel() - offset)
                yield chunk[offset : offset + count], part[start : start + count]
                start += count
            place += _aligned(end)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED


class HostOffload:
    """Moves tensors off a device and back, bit by bit the same.

    A tensor keeps its identity: its storage shrinks to nothing and grows again, so that models and
    optimizers that hold it need not know.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = HostBuffer(device)
        self._storages: list[tuple[torch.UntypedStorage, int]] = []
        """(storage, its size in bytes) of what waits on the host."""

    @property
    def offloaded_bytes(self) -> int:
        """Bytes that wait on the host now; 0 while everything is on the device."""
        return sum(size for _, size in self._storages)

    def offload(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copy these to the host and free their memory on the device."""
        device = self.buffer.device
        storages = {}
        for tensor in tensors:
            storage = local(tensor).untyped_storage()
            # Memory that is a file's, as a host may have it, is not ours to give back.
            if storage.device == device and storage.nbytes() and storage.resizable():
                storages[storage.data_ptr()] = storage
        self.buffer.store([_as_bytes(storage) for storage in storages.values()])
        for storage in storages.values():
            self._storages.append((storage, storage.nbytes()))
            storage.resize_(0)
        if device.type == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Bring everything back that was offloaded."""
        for storage, size in self._storages:
            storage.resize_(size)
        self.buffer.load([_as_bytes(storage) for storage, _ in self._storages])
        self._storages.clear()


def _as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
