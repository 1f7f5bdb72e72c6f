"""Checkpoints of a session: one directory, complete or not there.

    config.yaml   the settings
    state.json    counters, data position, the buffer of unfinished groups, metrics
    weights.safetensors, optimizer.safetensors, trainer.json   what the trainer wrote

It is written beside its place and renamed in one move. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.errors import CheckpointError
from kit.runs.record import current_run
from kit.syncing import sync

if TYPE_CHECKING:
    from kit.lifecycle import Lifecycle
    from kit.stack.stack import Stack

FORMAT = 1


def save(session: Lifecycle, stack: Stack, path: str | Path | None) -> Path:
    """Write a checkpoint and return where it is. Raises CheckpointError."""
    target = Path(path) if path is not None else _default(session)
    target = target.absolute()
    if target.exists() and not (target / "state.json").is_file():
        raise CheckpointError(
            f"{target} is there already and is no checkpoint.",
            fix="name a directory that does not exist yet.",
        )
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        session.config.dump(partial / "config.yaml")
        stack.save(str(partial))
        (partial / "state.json").write_text(json.dumps(_state(session)), encoding="utf-8")
        if target.exists():
            old = target.with_name(f"{target.name}.old-{os.getpid()}")
            target.rename(old)
            partial.rename(target)
            shutil.rmtree(old)
        else:
            partial.rename(target)
    except TypeError as error:
        raise CheckpointError(
            "The buffer of unfinished groups cannot be written: the metadata of a prompt holds "
            "what JSON does not know.",
            why=str(error),
            fix="keep text, numbers, lists and mappings in the data's metadata, or set "
            "rollout.partial_rollout: false.",
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {target} cannot be written.",
            why=str(error),
            fix="free space or name another directory; the session is unchanged.",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _default(session: Lifecycle) -> Path:
    run = current_run()
    if run:
        return run.checkpoint_dir()
    return Path("checkpoints") / f"{session.config.name}-step-{session.step_count:06d}"


def _state(session: Lifecycle) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step_count": session.step_count,
        "generations": session._generations,
        "stream": session._stream.state(),
        "buffer": session._buffer.state(),
        "history": session.history,
    }


def read(folder: Path) -> tuple[SessionConfig, dict[str, Any]]:
    """A checkpoint's configuration and state. Raises CheckpointError for what is none."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{folder.absolute()} is no checkpoint: it has no state.json.",
            fix="give the directory that session.save() returned.",
        ) from None
    except ValueError as error:
        raise CheckpointError(f"{folder / 'state.json'} is damaged: {error}.") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"The checkpoint has format {state.get('format')}; this version reads {FORMAT}.",
            fix="load it with the version of the kit that wrote it.",
        )
    return SessionConfig.load(folder / "config.yaml"), state


def restore(session: Lifecycle, stack: Stack, folder: Path, state: dict[str, Any]) -> None:
    """Bring a fresh session to where the checkpoint was made, engine included."""
    stack.load(str(folder.absolute()))
    session.step_count = int(state["step_count"])
    session._generations = int(state["generations"])
    session._stream.load_state(state["stream"])
    session._buffer.load_state(state.get("buffer", []))
    session.history = list(state["history"])
    sync(stack, session.step_count, exact=False, verify=False)
