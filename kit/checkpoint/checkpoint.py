"""Checkpoints of a session: one directory, complete or not there.

    manifest.json       format, versions, and the sha256 of every other file
    config.yaml         the settings
    state.json          counters, data position, the buffer of unfinished groups, metrics
    last_rollout.jsonl, last_batch.json   what was generated and trained on last
    trainer/            weights, optimizers, critic, reference, randomness: safetensors, sharded

It is written beside its place and put there in one move. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from kit.checkpoint import manifest
from kit.config import SessionConfig
from kit.errors import CheckpointError
from kit.lifecycle import resume
from kit.samples import Rollout
from kit.samples.serialization import read_batch, write_batch
from kit.stack.sync import sync
from kit.tracking.recorder import current_run
from kit.utils.files import put_in_place
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.lifecycle.start import Lifecycle
    from kit.stack.stack import Stack


STATE, CONFIG, TRAINER = "state.json", "config.yaml", "trainer"


LAST_ROLLOUT, LAST_BATCH = "last_rollout.jsonl", "last_batch.json"


def save(
    session: Lifecycle, stack: Stack, path: str | Path | None, keep_last: int | None = None
) -> Path:
    """Write a checkpoint and return where it is.

    Args:
        session: what is saved.
        stack: its stack.
        path: a directory; None takes one of the session's own, numbered by step.
        keep_last: of the numbered ones so many stay, the newest; None lets all stay.

    Raises:
        CheckpointError: it cannot be written; what was at `path` is still there.
    """
    target = (Path(path) if path is not None else default_path(session)).absolute()
    _save(session, stack, target)
    if path is None and keep_last:
        _remove_older(session, target, keep_last)
    return target


def save_step(session: Lifecycle, *, by_clock: bool = False) -> None:
    """What a training saves on its way: a checkpoint that is numbered by step.

    Args:
        session: what is saved.
        by_clock: the run asked for it, to be resumed from; of each training the newest stays.

    One that cannot be written is a RuntimeWarning: those before are still there, and a night's
    training is worth more than the next one.
    """
    target = default_path(session, numbered=True).absolute()
    try:
        _save(session, session._running, target, by_clock=by_clock)
    except CheckpointError as error:
        warnings.warn(f"Training goes on without a checkpoint. {error}", RuntimeWarning, 3)
        return
    if by_clock:
        resume.remove_older(target)
    elif keep_last := session.config.checkpoint.keep_last:
        _remove_older(session, target, keep_last)


def _save(session: Lifecycle, stack: Stack, target: Path, *, by_clock: bool = False) -> None:
    if target.exists() and manifest.kind_of(target) != "checkpoint":
        raise CheckpointError(
            f"{target} is there already and is no checkpoint.",
            fix="name a directory that does not exist yet.",
        )
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        _remove_leftovers(target)
        (partial / TRAINER).mkdir(parents=True)
        _write(session, stack, partial, by_clock)
        with held():
            put_in_place(partial, target)
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {target} cannot be written.",
            why=str(error),
            fix="free space or name another directory; the session is unchanged.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(session: Lifecycle, stack: Stack, folder: Path, by_clock: bool) -> None:
    with held():  # trainers that nobody waits for would write on into a folder that is going away
        stack.save(str(folder / TRAINER))
    session.config.dump(folder / CONFIG)
    try:
        (folder / STATE).write_text(json.dumps(standing(session)), encoding="utf-8")
    except TypeError as error:
        raise CheckpointError(
            "The buffer of unfinished groups cannot be written: the metadata of a prompt holds "
            "what JSON does not know.",
            why=str(error),
            fix="keep text, numbers, lists and mappings in the data's metadata, or set "
            "rollout.partial_rollout: false.",
        ) from error
    _write_last(session, folder)
    resume.note(session, folder, by_clock)
    facts = {
        "session": session.config.name,
        "step": session.step_count,
        "weight_version": session.weight_version,
        "model": session.config.model.name,
        "architecture": stack.model.architecture,
        "parameters": stack.info.get("parameters"),
        "num_trainers": session.config.training.num_trainers,
    }
    manifest.seal(folder, "checkpoint", facts)


def _write_last(session: Lifecycle, folder: Path) -> None:
    """What a session goes on without: left out where its metadata cannot be written."""
    if session.last_rollout is not None:
        try:
            session.last_rollout.save(folder / LAST_ROLLOUT)
        except TypeError:
            (folder / LAST_ROLLOUT).unlink()
    if session.last_batch is not None:
        try:
            write_batch(session.last_batch, folder / LAST_BATCH)
        except TypeError:
            (folder / LAST_BATCH).unlink(missing_ok=True)


def own_folder(session: Lifecycle) -> Path:
    """Where a session keeps things that were given no place."""
    run = current_run()
    return run.folder if run else Path("checkpoints")


def default_path(session: Lifecycle, *, numbered: bool = False) -> Path:
    """Where a session is saved when nobody says where; in a run below `checkpoints/`."""
    run = current_run()
    if run:
        return run.checkpoint_dir(session.step_count if numbered else None)
    return own_folder(session) / f"{session.config.name}-step-{session.step_count:06d}"


def _remove_leftovers(target: Path) -> None:
    """What a process that was killed while it wrote here has left."""
    for partial in target.parent.glob(f"{target.name}.partial-*"):
        pid = partial.name.rpartition("-")[2]
        if pid.isdigit() and (int(pid) == os.getpid() or not psutil.pid_exists(int(pid))):
            shutil.rmtree(partial, ignore_errors=True)


def _remove_older(session: Lifecycle, newest: Path, keep_last: int) -> None:
    """Numbered checkpoints of this session before the last few."""
    match = re.fullmatch(r"(.*-)\d+", newest.name)
    if not match:
        return
    numbered = []
    for folder in newest.parent.glob(f"{match[1]}*"):
        number = folder.name.removeprefix(match[1])
        if number.isdigit() and _is_of(folder, session):
            numbered.append((int(number), folder))
    older = [folder for _, folder in sorted(numbered) if folder != newest]
    for folder in older[: max(len(older) - (keep_last - 1), 0)]:
        (folder / manifest.MANIFEST).unlink(missing_ok=True)  # it is no checkpoint from here on
        shutil.rmtree(folder, ignore_errors=True)


def _is_of(folder: Path, session: Lifecycle) -> bool:
    with suppress(OSError, ValueError):
        found = json.loads((folder / manifest.MANIFEST).read_text(encoding="utf-8"))
        return isinstance(found, dict) and found.get("session") == session.config.name
    return False


def standing(session: Lifecycle) -> dict[str, Any]:
    """Where a session stands, in JSON's types as far as the data's metadata is made of them."""
    stack = session._running
    return {
        "step_count": session.step_count,
        "weight_version": stack.trainer_version,
        "newest_version": stack.newest_version,
        "generations": session._generations,
        "stream": session._stream.state(),
        "buffer": session._buffer.state(),
        "history": list(session.history),
    }


def read(folder: str | Path) -> tuple[SessionConfig, dict[str, Any]]:
    """A checkpoint's configuration and state, after all its files were compared with the manifest.

    Raises:
        CheckpointError: it is none, damaged, or of another format.
    """
    folder = Path(folder)
    manifest.read(folder)
    try:
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        if not isinstance(state, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged: {error}.") from error
    return SessionConfig.load(folder / CONFIG), state


def refuse_code(config: SessionConfig, folder: str | Path) -> None:
    """Raise CheckpointError for settings that would run Python code that somebody else wrote."""
    if config.model.trust_remote_code or config.engine.extra.get("trust_remote_code"):
        raise CheckpointError(
            f"The checkpoint {folder} asks for Python code that comes with the model "
            f"{config.model.name!r}.",
            why="A checkpoint is data; that it was saved with model.trust_remote_code is no reason "
            "to run code on this machine.",
            fix="if you trust the model's authors: RLSession.load(path, trust_remote_code=True).",
        )


def restore(session: Lifecycle, stack: Stack, folder: Path, state: dict[str, Any]) -> None:
    """Bring a session to where the checkpoint was made, engine included.

    Raises:
        CheckpointError, DataError: it cannot be read, or belongs to something else; the session is
            as it was.
    """
    take(session, stack, state, lambda: stack.load(str(folder.absolute() / TRAINER)))
    session.last_rollout = session.last_batch = None
    if (folder / LAST_ROLLOUT).is_file():
        session.last_rollout = Rollout.load(folder / LAST_ROLLOUT)
    if (folder / LAST_BATCH).is_file():
        session.last_batch = read_batch(folder / LAST_BATCH)


def take(
    session: Lifecycle, stack: Stack, state: dict[str, Any], trainers: Callable[[], None]
) -> None:
    """Make a session stand where `standing` was taken, all of it or nothing.

    Args:
        session: its counters, data and metrics.
        stack: its trainers are at the same point afterwards, and the engine has their weights.
        state: what `standing` gave.
        trainers: brings them there, and leaves them alone if it raises.
    """
    before = standing(session)
    with held():
        try:
            _stand(session, stack, state)
            trainers()
        except (KeyError, TypeError, ValueError) as error:
            _stand(session, stack, before)
            raise CheckpointError(
                f"The state of the session is damaged: {type(error).__name__} {error}."
            ) from error
        except BaseException:
            _stand(session, stack, before)
            raise
        # Numbers that were given since stay given: other weights had them.
        stack.newest_version = max(int(before["newest_version"]), int(state["newest_version"]))
        sync(stack, stack.trainer_version, exact=False, verify=False)


def _stand(session: Lifecycle, stack: Stack, state: dict[str, Any]) -> None:
    step, generations = int(state["step_count"]), int(state["generations"])
    version, newest = int(state["weight_version"]), int(state["newest_version"])
    history = [dict(row) for row in state["history"]]
    session._stream.load_state(state["stream"])
    session._buffer.load_state(state["buffer"])
    session.step_count, session._generations, session.history = step, generations, history
    stack.trainer_version, stack.newest_version = version, newest
