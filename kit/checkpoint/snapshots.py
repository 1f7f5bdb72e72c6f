"""Snapshots of a session: in the trainers' host memory, or as a checkpoint on disk.

The trainers keep what an update changes (weights, optimizers, critic, a moving reference, their
randomness); a `Snapshot` keeps the rest: counters, data position, buffer, metrics, settings of the
training, the last rollout and the last batch.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint import checkpoint
from kit.checkpoint.inputs import Inputs
from kit.checkpoint.state import TrainState
from kit.config import SessionConfig, TrainingConfig
from kit.config.changes import FIXED_IN_TRAINING, SHAPES_SAMPLES, values
from kit.errors import CheckpointError, SessionError
from kit.reports.status import Snapshot, find
from kit.tracking.recorder import Recorder
from kit.utils.formatting import data_size
from kit.utils.hardware import free_memory
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.stack.stack import Stack


NAME = re.compile(r"\w[\w .+=-]{0,79}")
REFERENCE = "a reference model (kl_loss_coef or kl_coef)"
SPARE = 0.1
"""Share of the free host memory that a snapshot leaves."""


class SnapshotStore(Mapping[str, Snapshot]):
    """Snapshots of a session by name, oldest first; the trainers hold the tensors."""

    def __init__(self, state: TrainState, use: Callable[[SessionConfig], None]) -> None:
        self._state, self._use = state, use
        self._kept: dict[str, Snapshot] = {}

    def __getitem__(self, name: str) -> Snapshot:
        return self._kept[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._kept)

    def __len__(self) -> int:
        return len(self._kept)

    def put(self, snapshot: Snapshot) -> None:
        """Add a snapshot as the newest."""
        self._kept.pop(snapshot.name, None)
        self._kept[snapshot.name] = snapshot

    def clear(self) -> None:
        """Drop all snapshots; the trainers are gone."""
        self._kept.clear()

    def take(
        self, stack: Stack, name: str | None, on_disk: bool, recorder: Recorder | None = None
    ) -> Snapshot:
        """Take a snapshot. Raises SessionError for a bad name, or without room."""
        name = _checked(name) if name is not None else self._default_name(stack.trainers.version)
        folder, size = None, 0
        if on_disk:
            own = f"{self._state.config.name}-snapshot-{name.replace(' ', '-')}"
            path = checkpoint.own_folder(recorder) / own
            folder = checkpoint.save(self._state, stack, path, recorder=recorder)
            size = _size(folder)
        else:
            self._check_room(stack.state_bytes(), name)
        with held():
            if not on_disk:
                size = stack.snapshot(name)
            elif name in self._kept:
                stack.forget(name)
            taken = self._snapshot(stack, name, size, folder)
            self.put(taken)
        return taken

    def _snapshot(
        self,
        stack: Stack,
        name: str,
        size: int,
        folder: Path | None,
        config: SessionConfig | None = None,
    ) -> Snapshot:
        state, rewards = self._state, self._state.rewards
        return Snapshot(
            name=name,
            step=state.step,
            weight_version=stack.trainers.version,
            reward=rewards[-1] if rewards and math.isfinite(rewards[-1]) else None,
            bytes=size,
            made=time.time(),
            folder=folder,
            training=(config or state.config).training,
            rollout=values(config or state.config, SHAPES_SAMPLES),
            state=state.to_json(stack.trainers),
            last_rollout=state.last_rollout,
            last_batch=state.last_batch,
        )

    def restore(self, stack: Stack, what: str | Path | Snapshot) -> Snapshot:
        """Go back to a snapshot, engine included.

        Raises:
            SessionError: there is none of this name, or the trainers do not hold it.
            CheckpointError: it is on disk and cannot be read. The session is as it was.
        """
        if isinstance(what, Path):
            return self._restore_checkpoint(stack, what)
        name = what.name if isinstance(what, Snapshot) else what
        kept = find(self._kept, name)
        if isinstance(what, Snapshot) and what is not kept:
            raise SessionError(
                f"The snapshot {name!r} of step {what.step} was replaced by one of step "
                f"{kept.step}.",
                fix=f"session.restore({name!r}) takes the newer one.",
            )
        state = self._state
        with held():
            checkpoint.move_to(state, stack, kept.state, lambda: load_trainers(stack, kept))
            state.last_rollout, state.last_batch = kept.last_rollout, kept.last_batch
            state.trained_batch = None
            self._use(restored_settings(state.config, kept.training, kept.rollout))
        return kept

    def _restore_checkpoint(self, stack: Stack, folder: Path) -> Snapshot:
        config, row = checkpoint.read(folder)
        if missing := Inputs.of_state(row).missing_in(self._state.inputs):
            raise CheckpointError(
                f"The session of the checkpoint {folder} was started with {missing} of its own, "
                "and this one was not.",
                why="It would go on with what the configuration of this session says instead.",
                fix="pass the same to `RLSession.start`, and restore again; or close this session "
                "and pass it to `RLSession.load`.",
            )
        _refuse_other_networks(self._state.config, config.training, folder)
        with held():
            checkpoint.restore(self._state, stack, folder, row)
            sampling = values(config, SHAPES_SAMPLES)
            self._use(restored_settings(self._state.config, config.training, sampling))
            return self._snapshot(stack, folder.name, _size(folder), folder, config)

    def forget(self, stack: Stack, name: str) -> None:
        """Release a snapshot. Raises SessionError for an unknown name."""
        kept = find(self._kept, name)
        with held():
            if kept.folder:
                shutil.rmtree(kept.folder, ignore_errors=True)
            else:
                stack.forget(name)
            del self._kept[name]

    def _default_name(self, version: int) -> str:
        """Default name, `step-4`, unless other weights of step 4 have it."""
        name = f"step-{self._state.step}"
        there = self._kept.get(name)
        same = there is None or there.weight_version == version
        return name if same else f"{name}-version-{version}"

    def _check_room(self, need: int, name: str) -> None:
        others = [s for s in self._kept.values() if s.folder is None and s.name != name]
        held_now = sum(s.bytes for s in others)
        limit = self._state.config.memory.snapshots_gib
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


def load_trainers(stack: Stack, snapshot: Snapshot) -> None:
    """Bring the trainers to a snapshot. Raises CheckpointError for one on disk that is damaged."""
    if snapshot.folder:
        checkpoint.read(snapshot.folder)
        stack.load(str(snapshot.folder / checkpoint.TRAINER))
    else:
        stack.restore(snapshot.name)


def restored_settings(
    config: SessionConfig, training: TrainingConfig, sampling: Mapping[str, Any]
) -> SessionConfig:
    """Settings of a session with those that an undo takes back.

    Args:
        config: the session's.
        training: of the moment that is restored; what trainers were started with stays.
        sampling: settings of `rollout` by their full names.
    """
    fixed = {name: getattr(config.training, name) for name in FIXED_IN_TRAINING}
    chosen = {name.removeprefix("rollout."): value for name, value in sampling.items()}
    return config.model_copy(
        update={
            "training": training.model_copy(update=fixed),
            "rollout": config.rollout.model_copy(update=chosen),
        }
    )


def _refuse_other_networks(own: SessionConfig, there: TrainingConfig, folder: Path) -> None:
    """Raise CheckpointError for one whose training has networks that the session's has not.

    Without its critic or reference it would go on as something that nobody has chosen.
    """
    has = _networks(own.training)
    if own.model.lora:  # the policy without its adapters
        has.append(REFERENCE)
    if missing := [network for network in _networks(there) if network not in has]:
        raise CheckpointError(
            f"The session of the checkpoint {folder} has {missing[0]}, and this one has none.",
            why="A session's networks are those that it was started with.",
            fix=f"close this one, and continue that: RLSession.load({str(folder)!r}).",
        )


def _networks(training: TrainingConfig) -> list[str]:
    """Networks beside the policy, with the settings that ask for them."""
    asked = {
        "a critic (advantage_estimator: ppo)": training.advantage_estimator == "ppo",
        "a draft that is trained (training.draft)": training.draft is not None,
        REFERENCE: training.has_reference,
        "a reference that moves (ref_update_interval)": training.ref_update_interval > 0,
    }
    return [network for network, is_there in asked.items() if is_there]


def _checked(name: str) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SessionError(
            f"{name!r} cannot be the name of a snapshot.",
            fix="give letters, digits, spaces and . _ + = -, 80 at most: 'before'.",
        )
    return name


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
