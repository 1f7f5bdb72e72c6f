"""A trainer's share of a GPU: how much it may take, what it took, and what happens when it ends.

`Parking`: host memory in which a trainer's tensors wait while the engine has the device.

A tensor keeps its identity: its storage shrinks to nothing and grows again, so that models and
optimizers that hold it need not know. The host's side is page-locked, where there is a GPU, and
made once: locking it takes longer than all copies of a session.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from kit.errors import StackError
from kit.trainer.fsdp import recover

GIB = 1 << 30


@dataclass(slots=True)
class DeviceMemory:
    """Looks at the device from inside the trainer's process."""

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

    def settle(self) -> None:
        """Give back what is held but not used, and forget the peak so far."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def read(self) -> dict[str, int]:
        """Bytes: `used` of the device by everybody now, `held` of it by torch in this process;
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


def _growing_segments(wanted: bool) -> None:
    """Segments that grow leave no gaps between micro-batches of different sizes."""
    torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")


@contextmanager
def out_of_memory(tokens: int, models: Sequence[nn.Module]) -> Iterator[None]:
    """Turn a lack of device memory into an error that says what to do; models stay usable.

    Args:
        tokens: of a micro-batch, the setting to lower.
        models: those that are at work.

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
    for model in models:
        recover(model)
        for parameter in model.parameters():
            parameter.grad = None
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise StackError(
        f"The trainer ran out of device memory with micro-batches of {tokens:,} tokens. Nothing "
        "was changed.",
        why=message,
        fix="lower training.max_tokens_per_gpu (a single longer sample is a micro-batch by "
        "itself), set model.gradient_checkpointing: true, or look at session.memory_plan().",
    )


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
