"""Snapshots on the trainer's side: its whole state in its own host memory, by name."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from kit.errors import SessionError
from kit.stack.trainer_tensors import HostCopy, fill_optimizers, local_bytes, state_tensors

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer


@dataclass(frozen=True, slots=True)
class TrainerSnapshot:
    """One rank's share of everything that an update changes."""

    names: tuple[str, ...]
    tensors: HostCopy
    counters: dict[str, Any]
    random: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, trainer: Trainer) -> TrainerSnapshot:
        """The trainer as it is now."""
        tensors = state_tensors(trainer)
        return cls(
            tuple(tensors),
            HostCopy(tensors.values(), trainer.device),
            counters(trainer),
            random_states(trainer.device),
        )

    def put_back(self, trainer: Trainer) -> None:
        """Make the trainer what it was, bit by bit."""
        fill_optimizers(trainer, self.names)
        tensors = state_tensors(trainer)
        if tuple(tensors) != self.names or sum(map(_size, tensors.values())) != self.tensors.size:
            raise SessionError(
                "The snapshot has another shape than the trainer now.",
                why="It was taken with other settings: another model, reference or critic.",
                fix="restore a snapshot that was taken since, or load a checkpoint.",
            )
        self.tensors.put_back(tensors.values())
        set_counters(trainer, self.counters)
        set_random_states(trainer.device, self.random)


def _size(tensor: torch.Tensor) -> int:
    return local_bytes(tensor).numel()


def size(trainer: Trainer) -> int:
    """Bytes that a snapshot of the present state takes of this rank's host memory."""
    return sum(map(_size, state_tensors(trainer).values()))


def digest(trainer: Trainer) -> str:
    """One word for this rank's weights, optimizers and counters: equal if every bit of them is."""
    found = hashlib.sha256(repr((trainer.optimizer_steps, trainer.updates)).encode())
    for name, tensor in state_tensors(trainer).items():
        found.update(name.encode())
        found.update(local_bytes(tensor).cpu().numpy().tobytes())
    return found.hexdigest()


def counters(trainer: Trainer) -> dict[str, Any]:
    """What else an update changes."""
    return {
        "optimizer_steps": trainer.optimizer_steps,
        "updates": trainer.updates,
        "last_update": trainer.last_update,
    }


def set_counters(trainer: Trainer, kept: dict[str, Any]) -> None:
    """The inverse of `counters`."""
    trainer.optimizer_steps, trainer.updates = kept["optimizer_steps"], kept["updates"]
    trainer.last_update = kept["last_update"]


def random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """Of what the trainer draws: on the host, and on its card."""
    card = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *card)


def set_random_states(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    """The inverse of `random_states`."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
