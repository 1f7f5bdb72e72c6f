"""What a trainer's state is made of: its tensors by name, and a copy of them in host memory.

Names are the same on every rank and whatever the number of ranks, so that snapshots and
checkpoints need not know of models and optimizers:

    policy/NAME                  a parameter, float32, sharded
    policy.optimizer/NAME//KEY   what AdamW keeps of it: `exp_avg`, `exp_avg_sq`, `step`
    reference/NAME               where the reference moves; else it is the model of the start
    critic/..., critic.optimizer/...

Snapshots on the trainer's side: its whole state in its own host memory, by name.

A trainer's state on disk, through torch's distributed checkpoint, as safetensors.

Each rank writes its own shards; any number of ranks reads them. Nothing is pickled: what torch
keeps in a `.metadata` pickle elsewhere stands in the heads of the safetensors here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from kit.errors import CheckpointError, SessionError
from kit.weight_sync.transport import in_buckets

if TYPE_CHECKING:
    from kit.trainer.actor import Trainer


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


def counters(trainer: Trainer) -> dict[str, Any]:
    """What else an update changes."""
    return {
        "optimizer_steps": trainer.optimizer_steps,
        "updates": trainer.updates,
        "last_update": trainer.last_update,
    }


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


dcp: Any = checkpoint  # it names what it offers in no way that a type checker can read


COUNTERS = "trainer.json"


FILE_BYTES = 1 << 30
"""Of one rank's file, about: while a file is written it is in memory twice."""


def save(trainer: Trainer, directory: str) -> None:
    """Write everything that an update changes. All ranks must call.

    Raises:
        CheckpointError: it cannot be written.
    """
    tensors = _on_disk(trainer)
    files = in_buckets(((n, t.numel() * t.element_size()) for n, t in tensors.items()), FILE_BYTES)
    places = {name: index for index, names in enumerate(files, start=1) for name in names}
    for rank in range(trainer.settings.training.num_trainers):
        places |= dict.fromkeys(_random_names(trainer, rank), 1)
    own = zip(_random_names(trainer), random_states(trainer.device), strict=True)
    writer = dcp.HuggingFaceStorageWriter(directory, places, save_distributed=True)
    try:
        dcp.save(tensors | dict(own), storage_writer=writer)
        if not trainer.settings.rank:
            kept = counters(trainer)
            del kept["last_update"]  # it is of this session
            (Path(directory) / COUNTERS).write_text(json.dumps(kept), encoding="utf-8")
    except (CheckpointException, OSError) as error:
        raise CheckpointError(
            f"The trainer's state cannot be written into {directory}.",
            why=_first_cause(error),
            fix="free space or name another directory; the session is unchanged.",
        ) from None


def load(trainer: Trainer, directory: str) -> None:
    """Read what `save` wrote, with any number of ranks; all must call.

    Raises:
        CheckpointError: a file is missing or broken, or belongs to another model; the trainer is
            unchanged.
    """
    reader = dcp.HuggingFaceStorageReader(directory)
    try:
        kept = json.loads((Path(directory) / COUNTERS).read_text(encoding="utf-8"))
        read = {"optimizer_steps": int(kept["optimizer_steps"]), "updates": int(kept["updates"])}
        found = {n: tuple(t.size) for n, t in _listed(reader).items()}
    except Exception as error:
        raise _unreadable(directory, error) from error
    before = TrainerSnapshot.of(trainer)
    try:
        fill_optimizers(trainer, found)
        tensors = _on_disk(trainer)
        _check_shapes(tensors, found, directory)
        states: tuple[torch.Tensor, ...] = ()
        if found.keys() >= set(_random_names(trainer)):
            states = tuple(torch.empty_like(state) for state in random_states(trainer.device))
            tensors |= zip(_random_names(trainer), states, strict=True)
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(directory))
    except BaseException as error:
        before.put_back(trainer)
        if isinstance(error, CheckpointError) or not isinstance(
            error, (Exception, CheckpointException)
        ):
            raise
        raise _unreadable(directory, error) from error
    set_counters(trainer, read | {"last_update": None})
    if states:
        set_random_states(trainer.device, states)


def _listed(reader: Any) -> Any:
    return reader.read_metadata().state_dict_metadata


def _on_disk(trainer: Trainer) -> dict[str, Any]:
    """The state's tensors as files have them: a number is a row of one."""
    return {n: t.view(1) if t.ndim == 0 else t for n, t in state_tensors(trainer).items()}


def _random_names(trainer: Trainer, rank: int | None = None) -> Sequence[str]:
    """Of what a rank draws; one that did not write any starts with its seed."""
    rank = trainer.settings.rank if rank is None else rank
    return [f"random/{rank}/{where}" for where in ("host", trainer.device.type)][
        : 1 + (trainer.device.type == "cuda")
    ]


def _check_shapes(
    own: dict[str, torch.Tensor], found: dict[str, tuple[int, ...]], directory: str
) -> None:
    for name, tensor in own.items():
        if found.get(name) != tuple(tensor.shape):
            there = f"has shape {found[name]}" if name in found else "is not there"
            raise CheckpointError(
                f"The checkpoint {directory} is of another model: {name} {there}, this model's "
                f"has {tuple(tensor.shape)}.",
                fix="start the session with the model and the estimator that the checkpoint was "
                "made with.",
            )


def _unreadable(directory: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {directory} cannot be read.",
        why=_first_cause(error),
        fix="load another checkpoint; the session's weights are unchanged.",
    )


def _first_cause(error: BaseException) -> str:
    """What a rank said, without the others' traces."""
    causes: Iterable[Any] = getattr(error, "failures", {}).values()
    first = next(iter(causes), None)
    return str(first[0] if first else error)
