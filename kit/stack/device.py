"""A trainer's share of a GPU: how much it may take, what it took, and what happens when it ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kit.errors import StackError
from kit.stack.fsdp import recover

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
