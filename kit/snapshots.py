"""Snapshots of a session: in the trainers' host memory, or as a checkpoint on disk.

The trainers keep what an update changes (weights, optimizers, critic, a moving reference, their
randomness); a `Snapshot` keeps the rest: counters, data position, buffer, metrics, settings of the
training, the last rollout and the last batch.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.config_training import TrainingConfig
from kit.errors import SessionError, did_you_mean
from kit.interrupts import held
from kit.reports import REWARD, Shown
from kit.samples import Batch, Rollout

if TYPE_CHECKING:
    from kit.lifecycle import Lifecycle
    from kit.stack.stack import Stack

NAME = re.compile(r"\w[\w .+=-]{0,79}")
SPARE = 0.1
"""Share of the free host memory that a snapshot leaves."""


@dataclass(frozen=True, slots=True)
class Snapshot(Shown):
    """A moment of a session that `restore` can bring back, bit by bit."""

    name: str
    step: int
    """Updates applied by then."""
    weight_version: int
    reward: float | None
    """Mean reward of the last step by then; None before the first."""
    bytes: int
    """Of host memory, or on disk."""
    made: float
    """Seconds since 1970."""
    folder: Path | None = None
    """Where it is on disk; None in host memory."""
    training: TrainingConfig = field(default_factory=TrainingConfig, repr=False)
    """The settings that the training had."""
    state: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Counters, data position, buffer, metrics; see `kit.checkpoint.standing`."""
    last_rollout: Rollout | None = field(default=None, repr=False, compare=False)
    last_batch: Batch | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Snapshots(Shown, Sequence[Snapshot]):
    """All snapshots of a session, the oldest first."""

    all: tuple[Snapshot, ...]
    now: int
    """The weight version that the trainer holds."""

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: Any) -> Any:
        """By place, or by name."""
        if isinstance(index, str):
            return find({s.name: s for s in self.all}, index)
        return self.all[index]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.all)

    @property
    def host_bytes(self) -> int:
        """Host memory that they hold together."""
        return sum(s.bytes for s in self.all if s.folder is None)


def snapshot(session: Lifecycle, stack: Stack, name: str | None, on_disk: bool) -> Snapshot:
    """Take one. Raises SessionError for a name that is none, or where there is no room."""
    name = _checked(name) if name is not None else _default_name(session)
    rewards = [row[REWARD] for row in session.history if REWARD in row]
    folder, size = None, 0
    if on_disk:
        folder, size = _written(session, stack, name)
    else:
        _check_room(session, stack, name)
    with held():
        if not on_disk:
            size = stack.snapshot(name)
        elif name in session._snapshots:
            stack.forget(name)
        session._snapshots.pop(name, None)  # the newest is the last
        session._snapshots[name] = taken = _of(session, name, size, folder, rewards)
    return taken


def _of(
    session: Lifecycle, name: str, size: int, folder: Path | None, rewards: list[float]
) -> Snapshot:
    from kit.checkpoint import standing

    return Snapshot(
        name=name,
        step=session.step_count,
        weight_version=session.weight_version,
        reward=rewards[-1] if rewards and math.isfinite(rewards[-1]) else None,
        bytes=size,
        made=time.time(),
        folder=folder,
        training=session.config.training,
        state=standing(session),
        last_rollout=session.last_rollout,
        last_batch=session.last_batch,
    )


def restore(session: Lifecycle, stack: Stack, what: str | Path | Snapshot) -> Snapshot:
    """Go back to one, engine included.

    Raises:
        SessionError: there is none of this name, or the trainers do not hold it.
        CheckpointError: it is on disk and cannot be read. The session is as it was.
    """
    from kit import checkpoint

    if isinstance(what, Path):
        return _from_checkpoint(session, stack, what)
    name = what.name if isinstance(what, Snapshot) else what
    kept = find(session._snapshots, name)
    if isinstance(what, Snapshot) and what is not kept:
        raise SessionError(
            f"The snapshot {name!r} of step {what.step} was replaced by one of step {kept.step}.",
            fix=f"session.restore({name!r}) takes the newer one.",
        )
    if kept.folder:
        checkpoint.read(kept.folder)  # is it as it was written?
        folder = str(kept.folder / checkpoint.TRAINER)
    with held():
        checkpoint.take(
            session,
            stack,
            dict(kept.state),
            lambda: stack.load(folder) if kept.folder else stack.restore(name),
        )
        session.last_rollout, session.last_batch = kept.last_rollout, kept.last_batch
        train_with(session, stack, kept.training)
    return kept


def _from_checkpoint(session: Lifecycle, stack: Stack, folder: Path) -> Snapshot:
    from kit import checkpoint

    config, state = checkpoint.read(folder)
    with held():
        checkpoint.restore(session, stack, folder, state)
        train_with(session, stack, config.training)
        rewards = [row[REWARD] for row in session.history if REWARD in row]
        return _of(session, folder.name, _size(folder), folder, rewards)


def train_with(session: Lifecycle, stack: Stack, training: TrainingConfig) -> None:
    """Have session and trainers go on with these settings of the training."""
    running = session.config.training.num_trainers
    training = training.model_copy(update={"num_trainers": running})
    if training != session.config.training:
        stack.configure(training)
        session.config = session.config.model_copy(update={"training": training})


def forget(session: Lifecycle, stack: Stack, name: str) -> None:
    """Give back what a snapshot holds. Raises SessionError where there is none of this name."""
    import shutil

    kept = find(session._snapshots, name)
    with held():
        if kept.folder:
            shutil.rmtree(kept.folder, ignore_errors=True)
        else:
            stack.forget(name)
        del session._snapshots[name]


def find(snapshots: Mapping[str, Snapshot], name: str) -> Snapshot:
    """One by name. Raises SessionError that names those that exist."""
    if name not in snapshots:
        raise SessionError(
            f"There is no snapshot {name!r}.",
            fix=did_you_mean(name, snapshots)
            if snapshots
            else "take one first: session.snapshot(name). There is none yet.",
        )
    return snapshots[name]


def _checked(name: str) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SessionError(
            f"{name!r} cannot be the name of a snapshot.",
            fix="give letters, digits, spaces and . _ + = -, 80 at most: 'before'.",
        )
    return name


def _default_name(session: Lifecycle) -> str:
    """`step-4`, unless other weights of step 4 have that name already."""
    name = f"step-{session.step_count}"
    there = session._snapshots.get(name)
    same = there is None or there.weight_version == session.weight_version
    return name if same else f"{name}-version-{session.weight_version}"


def _written(session: Lifecycle, stack: Stack, name: str) -> tuple[Path, int]:
    from kit import checkpoint

    own = f"{session.config.name}-snapshot-{name.replace(' ', '-')}"
    folder = checkpoint.save(session, stack, checkpoint.own_folder(session) / own)
    return folder, _size(folder)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _check_room(session: Lifecycle, stack: Stack, name: str) -> None:
    from kit.doctor.machine import free_memory
    from kit.viz.text import data_size

    need = stack.state_bytes()
    others = [s for s in session._snapshots.values() if s.folder is None and s.name != name]
    held_now = sum(s.bytes for s in others)
    limit = session.config.memory.snapshots_gib
    free = int(free_memory() * (1 - SPARE))
    if limit is not None and held_now + need > limit * (1 << 30):
        why = f"memory.snapshots_gib allows {limit:g} GiB in all."
    elif need > free:
        why = f"The host has {data_size(free)} to spare."
    else:
        return
    listed = ", ".join(f"{s.name} ({data_size(s.bytes)})" for s in others) or "none"
    raise SessionError(
        f"There is no room for the snapshot {name!r}, which takes {data_size(need)} of host "
        f"memory; held already: {listed}.",
        why=why,
        fix="give one back (`session.forget(name)`), or keep this one on disk: "
        "session.snapshot(name, on_disk=True).",
    )
