"""`TrainerState`: everything that an update changes, in host memory and on disk.

Tensors go by names that are the same on every rank and whatever the number of ranks, so that
snapshots and checkpoints need not know of models and optimizers:

    policy/NAME                  a parameter, float32, sharded
    policy.optimizer/NAME//KEY   what AdamW keeps of it: `exp_avg`, `exp_avg_sq`, `step`; in
                                 8 bits `exp_avg.codes`, `exp_avg.scale` and so on
    reference/NAME               where the reference moves; else it is the model of the start
    critic/..., critic.optimizer/...

On disk, torch's distributed checkpoint writes them as safetensors: each rank its own shards, which
any number of ranks reads. Nothing is pickled: what torch keeps in a `.metadata` pickle elsewhere
stands in the heads of the safetensors here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from kit.errors import CheckpointError, SessionError
from kit.models.sharding import local_bytes
from kit.trainer.backend import TrainerBackend
from kit.trainer.offload import HostBuffer
from kit.utils.reading import read_object
from kit.weight_sync.transport import in_buckets

dcp: Any = checkpoint  # it names what it offers in no way that a type checker can read
COUNTERS = "trainer.json"
FILE_BYTES = 1 << 30
"""Approximate size of one file of a rank; while it is written it is in memory twice."""


@dataclass(frozen=True, slots=True)
class Parked:
    """The state of a session that waits while another one has the networks."""

    state: TrainerState
    copy: Snapshot


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Snapshot of one rank's state, in host memory."""

    names: tuple[str, ...]
    size: int
    """Bytes of its tensors."""
    tensors: HostBuffer
    counters: tuple[int, int, tuple[str, list[dict[str, float]]] | None]
    random: tuple[torch.Tensor, ...]


class TrainerState:
    """One rank's tensors, counters and randomness: copied, put back, saved and loaded."""

    def __init__(self, backend: TrainerBackend, rank: int, ranks: int) -> None:
        self._backend, self._rank, self._ranks = backend, rank, ranks
        self.optimizer_steps = 0
        """Optimizer steps of the policy."""
        self.updates = 0
        self.last_update: tuple[str, list[dict[str, float]]] | None = None
        """The id of the last one, and the metrics of its steps."""
        self.update_seconds = 0.0
        """That it took."""
        self.snapshots: dict[str, Snapshot] = {}

    # ---- several of them on the same networks --------------------------------------------------

    def twin(self) -> TrainerState:
        """Another state that goes on from here, without the snapshots of this one."""
        other = TrainerState(self._backend, self._rank, self._ranks)
        other.optimizer_steps, other.updates = self.optimizer_steps, self.updates
        other.last_update, other.update_seconds = self.last_update, self.update_seconds
        return other

    def begin_anew(self, seed: int) -> None:
        """Be as after a start with this seed: new adapters, optimizers and counters."""
        self._backend.begin_anew(seed)
        self.optimizer_steps = self.updates = 0
        self.last_update, self.update_seconds = None, 0.0

    # ---- in host memory ------------------------------------------------------------------------

    def copy(self, into: HostBuffer | None = None) -> Snapshot:
        """Copy the state as it is now into host memory; into this, if it is free."""
        tensors = self._backend.state_tensors()
        buffer = into or HostBuffer(self._backend.device)
        buffer.store([local_bytes(tensor) for tensor in tensors.values()])
        counters = (self.optimizer_steps, self.updates, self.last_update)
        return Snapshot(
            tuple(tensors), _size(tensors), buffer, counters, random_states(self._backend.device)
        )

    def put_back(self, snapshot: Snapshot) -> None:
        """Make the trainer what it was, bit by bit.

        Raises:
            SessionError: models or optimizers have another shape now.
        """
        self._backend.fill_optimizers(snapshot.names)
        tensors = self._backend.state_tensors()
        if tuple(tensors) != snapshot.names or _size(tensors) != snapshot.size:
            raise SessionError(
                "The snapshot has another shape than the trainer now.",
                why="It was taken with other settings: another model, reference or critic.",
                fix="restore a snapshot that was taken since, or load a checkpoint.",
            )
        snapshot.tensors.load([local_bytes(tensor) for tensor in tensors.values()])
        self.optimizer_steps, self.updates, self.last_update = snapshot.counters
        set_random_states(self._backend.device, snapshot.random)

    def keep(self, name: str) -> int:
        """Keep a copy of the state under a name; its bytes."""
        self.snapshots[name] = self.copy()
        return self.snapshots[name].size

    def restore(self, name: str) -> None:
        """Put back what `keep` kept.

        Raises:
            SessionError: this process has none of that name; it was started again since.
        """
        if name not in self.snapshots:
            raise SessionError(
                f"The trainer does not hold the snapshot {name!r}.",
                why="Its process was started again since; what was in its memory is gone.",
                fix="restore a snapshot that is on disk, or load a checkpoint.",
            )
        self.put_back(self.snapshots[name])

    def size(self) -> int:
        """Bytes that a copy of the present state takes of this rank's host memory."""
        return _size(self._backend.state_tensors())

    def digest(self) -> str:
        """Digest of this rank's tensors and counters: equal if every bit of them is."""
        word = hashlib.sha256(repr((self.optimizer_steps, self.updates)).encode())
        for name, tensor in self._backend.state_tensors().items():
            word.update(name.encode())
            word.update(local_bytes(tensor).cpu().numpy().tobytes())
        return word.hexdigest()

    # ---- on disk -------------------------------------------------------------------------------

    def save(self, directory: str) -> None:
        """Write the state. All ranks must call.

        Raises:
            CheckpointError: it cannot be written.
        """
        tensors = self._on_disk()
        sizes = ((name, t.numel() * t.element_size()) for name, t in tensors.items())
        files = in_buckets(sizes, FILE_BYTES)
        places = {name: index for index, names in enumerate(files, start=1) for name in names}
        for rank in range(self._ranks):
            places |= dict.fromkeys(self._random_names(rank), 1)
        own = zip(self._random_names(), random_states(self._backend.device), strict=True)
        writer = dcp.HuggingFaceStorageWriter(directory, places, save_distributed=True)
        try:
            dcp.save(tensors | dict(own), storage_writer=writer)
            if not self._rank:
                # Not the last update: that is of this session.
                counters = {"optimizer_steps": self.optimizer_steps, "updates": self.updates}
                (Path(directory) / COUNTERS).write_text(json.dumps(counters), encoding="utf-8")
        except (CheckpointException, OSError) as error:
            raise CheckpointError(
                f"The trainer's state cannot be written into {directory}.",
                why=_first_cause(error),
                fix="free space or name another directory; the session is unchanged.",
            ) from None

    def load(self, directory: str) -> None:
        """Read what `save` wrote, with any number of ranks; all must call.

        Raises:
            CheckpointError: a file is missing or broken, or belongs to another model; the trainer
                is unchanged.
        """
        reader = dcp.HuggingFaceStorageReader(directory)
        try:
            counters = read_object(Path(directory) / COUNTERS)
            optimizer_steps, updates = counters["optimizer_steps"], counters["updates"]
            if not all(type(n) is int and n >= 0 for n in (optimizer_steps, updates)):
                raise ValueError(f"{COUNTERS} holds no numbers of steps")
            entries: Any = reader.read_metadata().state_dict_metadata
            shapes = {name: tuple(entry.size) for name, entry in entries.items()}
        except Exception as error:
            raise _unreadable(directory, error) from error
        device = self._backend.device
        before = self.copy()
        try:
            self._backend.fill_optimizers(shapes)
            tensors = self._on_disk()
            _check_shapes(tensors, shapes, directory)
            states: tuple[torch.Tensor, ...] = ()
            if shapes.keys() >= set(self._random_names()):
                states = tuple(torch.empty_like(state) for state in random_states(device))
                tensors |= zip(self._random_names(), states, strict=True)
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(directory))
        except BaseException as error:
            self.put_back(before)
            if isinstance(error, CheckpointError) or not isinstance(
                error, (Exception, CheckpointException)
            ):
                raise
            raise _unreadable(directory, error) from error
        self.optimizer_steps, self.updates, self.last_update = optimizer_steps, updates, None
        if states:
            set_random_states(device, states)

    def _on_disk(self) -> dict[str, Any]:
        """The tensors as files have them: a number is a row of one."""
        tensors = self._backend.state_tensors()
        return {name: t.view(1) if t.ndim == 0 else t for name, t in tensors.items()}

    def _random_names(self, rank: int | None = None) -> Sequence[str]:
        """Names of a rank's RNG states; a rank that wrote none starts with its seed."""
        rank = self._rank if rank is None else rank
        kind = self._backend.device.type
        return [f"random/{rank}/{where}" for where in ("host", kind)][: 1 + (kind == "cuda")]


def _size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(local_bytes(tensor).numel() for tensor in tensors.values())


def random_states(device: torch.device) -> tuple[torch.Tensor, ...]:
    """RNG states of the host and of the GPU."""
    gpu = (torch.cuda.get_rng_state(device),) if device.type == "cuda" else ()
    return (torch.get_rng_state(), *gpu)


def set_random_states(device: torch.device, states: tuple[torch.Tensor, ...]) -> None:
    """Put back what `random_states` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)


def forked_random(device: torch.device) -> AbstractContextManager[None]:
    """Draw in here without changing what the trainer draws afterwards."""
    return torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else [])


def _check_shapes(
    own: dict[str, torch.Tensor], shapes: dict[str, tuple[int, ...]], directory: str
) -> None:
    for name, tensor in own.items():
        if shapes.get(name) != tuple(tensor.shape):
            there = f"has shape {shapes[name]}" if name in shapes else "is not there"
            raise CheckpointError(
                f"The checkpoint {directory} is of another model: {name} {there}, this model's "
                f"has {tuple(tensor.shape)}.",
                fix="start the session with the model, the estimator and the optimizer that the "
                "checkpoint was made with.",
            )


def _unreadable(directory: str, error: BaseException) -> CheckpointError:
    return CheckpointError(
        f"The checkpoint {directory} cannot be read.",
        why=_first_cause(error),
        fix="load another checkpoint; the session's weights are unchanged.",
    )


def _first_cause(error: BaseException) -> str:
    """The message of the first rank that failed, without the traces of all."""
    causes: Iterable[Any] = getattr(error, "failures", {}).values()
    first = next(iter(causes), None)
    return str(first[0] if first else error)
