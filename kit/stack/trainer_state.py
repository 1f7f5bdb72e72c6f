"""A trainer's state on disk, through torch's distributed checkpoint, as safetensors.

Each rank writes its own shards; any number of ranks reads them. Nothing is pickled: what torch
keeps in a `.metadata` pickle elsewhere stands in the heads of the safetensors here.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException

from kit.errors import CheckpointError
from kit.stack.buckets import in_buckets
from kit.stack.trainer_snapshots import (
    TrainerSnapshot,
    counters,
    random_states,
    set_counters,
    set_random_states,
)
from kit.stack.trainer_tensors import fill_optimizers, state_tensors

if TYPE_CHECKING:
    from kit.stack.trainer import Trainer

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
