"""Snapshots of a session: in the trainers' host memory, or as a checkpoint on disk.

The trainers keep what an update changes (weights, optimizers, critic, a moving reference, their
randomness); a `Snapshot` keeps the rest: counters, data position, buffer, metrics, settings of the
training, the last rollout and the last batch.
"""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

from kit.config import TrainingConfig
from kit.errors import SessionError
from kit.reports import REWARD
from kit.reports.status import Snapshot, find
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.lifecycle.start import Lifecycle
    from kit.stack.stack import Stack


NAME = re.compile(r"\w[\w .+=-]{0,79}")


SPARE = 0.1
"""Share of the free host memory that a snapshot leaves."""


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
    from kit.checkpoint.checkpoint import standing

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
    from kit.checkpoint import checkpoint

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
    from kit.checkpoint import checkpoint

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
    from kit.checkpoint import checkpoint

    own = f"{session.config.name}-snapshot-{name.replace(' ', '-')}"
    folder = checkpoint.save(session, stack, checkpoint.own_folder(session) / own)
    return folder, _size(folder)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _check_room(session: Lifecycle, stack: Stack, name: str) -> None:
    from kit.utils.formatting import data_size
    from kit.utils.hardware import free_memory

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
