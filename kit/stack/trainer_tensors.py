"""What a trainer's state is made of: its tensors by name, and a copy of them in host memory.

Names are the same on every rank and whatever the number of ranks, so that snapshots and
checkpoints need not know of models and optimizers:

    policy/NAME                  a parameter, float32, sharded
    policy.optimizer/NAME//KEY   what AdamW keeps of it: `exp_avg`, `exp_avg_sq`, `step`
    reference/NAME               where the reference moves; else it is the model of the start
    critic/..., critic.optimizer/...
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer

CHUNK = 64 << 20
"""Bytes of a piece of host memory: large ones would be rounded up to a power of two."""


def learners(trainer: Trainer) -> Iterator[tuple[str, Any, Any]]:
    """(name, model, optimizer) of each model that learns."""
    yield "policy", trainer.policy, trainer.optimizer
    if trainer.critic:
        yield "critic", trainer.critic.model, trainer.critic.optimizer


def state_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Every tensor of the state by name, in the same order on every rank."""
    found: dict[str, torch.Tensor] = {}
    for name, model, optimizer in learners(trainer):
        _resharded(model)
        for parameter, value in model.named_parameters():
            found[f"{name}/{parameter}"] = value
            for key, kept in optimizer.state.get(value, {}).items():
                found[f"{name}.optimizer/{parameter}//{key}"] = kept
    if trainer.reference and trainer.settings.training.ref_update_interval:
        _resharded(trainer.reference)
        for parameter, value in trainer.reference.named_parameters():
            found[f"reference/{parameter}"] = value
    return found


def fill_optimizers(trainer: Trainer, names: Iterable[str]) -> None:
    """Have optimizers hold just what of these names is theirs; what is new there is zero."""
    wanted = set(names)
    for name, model, optimizer in learners(trainer):
        for parameter, value in model.named_parameters():
            prefix = f"{name}.optimizer/{parameter}//"
            if f"{prefix}step" not in wanted:
                optimizer.state.pop(value, None)
            elif not optimizer.state.get(value):
                optimizer.state[value] = {
                    "step": torch.zeros((), dtype=torch.float32, device=value.device),
                    "exp_avg": torch.zeros_like(value),
                    "exp_avg_sq": torch.zeros_like(value),
                }


def _resharded(model: nn.Module) -> None:
    """The parameters that FSDP keeps are then the module's own."""
    sharded: Any = model
    sharded.reshard()


def local_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a tensor as flat bytes; it shares the tensor's memory."""
    own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return own.detach().view(-1).view(torch.uint8)


class HostCopy:
    """A copy of tensors in host memory, from which they can be put back bit by bit.

    On a GPU's host it is page-locked: copies are then as fast as the bus is.
    """

    def __init__(self, tensors: Iterable[torch.Tensor], device: torch.device) -> None:
        parts = [local_bytes(tensor) for tensor in tensors]
        self.device, self.size = device, sum(part.numel() for part in parts)
        self._chunks = [
            torch.empty(
                min(CHUNK, self.size - start),
                dtype=torch.uint8,
                pin_memory=device.type == "cuda",
            )
            for start in range(0, self.size, CHUNK)
        ]
        for kept, own in self._pairs(parts):
            kept.copy_(own, non_blocking=True)
        self._wait()

    def put_back(self, tensors: Iterable[torch.Tensor]) -> None:
        """Write the copy into the same tensors, in the same order."""
        for kept, own in self._pairs([local_bytes(tensor) for tensor in tensors]):
            own.copy_(kept, non_blocking=True)
        self._wait()

    def _pairs(self, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Stretches of the copy, each with the stretch of a tensor that belongs to it."""
        place = 0
        for part in parts:
            start = 0
            while start < part.numel():
                chunk, offset = self._chunks[place // CHUNK], place % CHUNK
                count = min(part.numel() - start, chunk.numel() - offset)
                yield chunk[offset : offset + count], part[start : start + count]
                start, place = start + count, place + count

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
