"""Checkpoints of a session: one directory each, complete or absent.

    manifest.json       format, versions, and the sha256 of every other file
    config.yaml         the settings
    state.json          counters, data position, the buffer of unfinished groups, metrics
    last_rollout.jsonl, last_batch.json   what was generated and trained on last
    trainer/            weights, optimizers, critic, reference, randomness: safetensors, sharded

It is written beside its place and put there in one move. Nothing in it is pickled.
"""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint import manifest, values
from kit.checkpoint.state import TrainState
from kit.config import SessionConfig
from kit.errors import CheckpointError, DataError
from kit.models.source import weights_digest
from kit.samples import Batch, Rollout
from kit.samples.serialization import read_batch, write_batch
from kit.tracking.recorder import Recorder, current_run, is_mark
from kit.utils.interrupts import held
from kit.utils.reading import read_object

if TYPE_CHECKING:
    from kit.stack.stack import Stack


STATE, CONFIG, TRAINER = "state.json", "config.yaml", "trainer"
LAST_ROLLOUT, LAST_BATCH = "last_rollout.jsonl", "last_batch.json"

LONGEST_STATE = 2 * 10**9
"""Bytes of `state.json`: a row of metrics for each step of a long training."""
BASE = "base"
"""In the manifest, of a session that trains adapters: a digest of the weights beside them."""
RUN_NOTE = "run.json"
"""Which training of a batch run it belongs to, and where the run's files ended."""


def save(
    state: TrainState,
    stack: Stack,
    path: str | Path | None,
    keep_last: int | None = None,
    recorder: Recorder | None = None,
) -> Path:
    """Write a checkpoint and return its path.

    Args:
        state: what is saved.
        stack: whose trainers write their weights.
        path: a directory; None takes one of the session's own, numbered by step.
        keep_last: of the numbered ones so many stay, the newest; None lets all stay.
        recorder: of the batch run that the session belongs to.

    Raises:
        CheckpointError: it cannot be written; what was at `path` is still there.
    """
    target = (Path(path) if path is not None else default_path(state, recorder)).absolute()
    _save(state, stack, target, recorder)
    if path is None and keep_last:
        _remove_older(state.config.name, target, keep_last)
    return target


def save_step(
    state: TrainState, stack: Stack, recorder: Recorder | None, *, by_clock: bool = False
) -> None:
    """Write a numbered checkpoint of the running training.

    One that cannot be written is a RuntimeWarning: those before are still there, and a night's
    training is worth more than the next one.

    With `by_clock` the run asked for it, to be resumed from; of each training the newest stays.
    """
    target = default_path(state, recorder, numbered=True).absolute()
    try:
        _save(state, stack, target, recorder, by_clock=by_clock)
    except CheckpointError as error:
        warnings.warn(f"Training goes on without a checkpoint. {error}", RuntimeWarning, 3)
        return
    if by_clock:
        _remove_older_by_clock(target)
    elif keep_last := state.config.checkpoint.keep_last:
        _remove_older(state.config.name, target, keep_last)


def _save(
    state: TrainState,
    stack: Stack,
    target: Path,
    recorder: Recorder | None,
    *,
    by_clock: bool = False,
) -> None:
    with manifest.new_folder(target, "checkpoint") as folder:
        (folder / TRAINER).mkdir()
        _write(state, stack, folder)
        if recorder and recorder.training:
            note = {"step": state.step, "by_clock": by_clock, "mark": recorder.mark()}
            text = json.dumps(asdict(recorder.training) | note)
            (folder / RUN_NOTE).write_text(text, encoding="utf-8")
        facts = {
            "session": state.config.name,
            "step": state.step,
            "weight_version": stack.trainers.version,
            "model": state.config.model.name,
            "architecture": stack.model.architecture,
            "parameters": stack.info.get("parameters"),
            "num_trainers": state.config.training.num_trainers,
        }
        if state.config.model.lora:
            facts[BASE] = weights_digest(stack.model.path)
        manifest.seal(folder, "checkpoint", facts)
    state.saved = state.step


def _write(state: TrainState, stack: Stack, folder: Path) -> None:
    with held():  # trainers that nobody waits for would write on into a folder that is going away
        stack.save(str(folder / TRAINER))
    state.config.dump(folder / CONFIG)
    try:
        (folder / STATE).write_text(json.dumps(state.to_json(stack.trainers)), encoding="utf-8")
    except TypeError as error:
        raise CheckpointError(
            "The buffer of unfinished groups cannot be written: the metadata of a prompt holds "
            "what JSON does not know.",
            why=str(error),
            fix="keep text, numbers, lists and mappings in the data's metadata, or set "
            "rollout.partial_rollout: false.",
        ) from error
    _write_last(state, folder)


def _write_last(state: TrainState, folder: Path) -> None:
    """Write the last rollout and batch, without which a session could go on: each is left out where
    its metadata cannot be written.
    """
    if state.last_rollout is not None:
        try:
            state.last_rollout.save(folder / LAST_ROLLOUT)
        except TypeError:
            (folder / LAST_ROLLOUT).unlink()
    if state.last_batch is not None:
        try:
            write_batch(state.last_batch, folder / LAST_BATCH)
        except TypeError:
            (folder / LAST_BATCH).unlink(missing_ok=True)


def own_folder(recorder: Recorder | None) -> Path:
    """Folder for what a session saves without a path; a fork's recorder has one of its own."""
    run = recorder or current_run()
    return run.folder if run else Path("checkpoints")


def default_path(
    state: TrainState, recorder: Recorder | None = None, *, numbered: bool = False
) -> Path:
    """Default path of `save`; in a run below `checkpoints/`."""
    run = recorder or current_run()
    if run:
        return run.checkpoint_dir(state.step if numbered else None)
    return own_folder(None) / f"{state.config.name}-step-{state.step:06d}"


def _remove_older(name: str, newest: Path, keep_last: int) -> None:
    """Remove this session's numbered checkpoints before the last few."""
    match = re.fullmatch(r"(.*-)\d+", newest.name)
    if not match:
        return
    numbered = []
    for folder in newest.parent.glob(f"{match[1]}*"):
        number = folder.name.removeprefix(match[1])
        if number.isdigit() and manifest.peek(folder).get("session") == name:
            numbered.append((int(number), folder))
    older = [folder for _, folder in sorted(numbered) if folder != newest]
    for folder in older[: max(len(older) - (keep_last - 1), 0)]:
        _remove(folder)


def _remove(folder: Path) -> None:
    (folder / manifest.MANIFEST).unlink(missing_ok=True)  # it is no checkpoint from here on
    shutil.rmtree(folder, ignore_errors=True)


def run_note(folder: Path) -> dict[str, Any] | None:
    """Read a checkpoint's position in its run; None if it has none."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        note = read_object(folder / RUN_NOTE)
        values.whole_numbers(note, ("session", "training", "begin", "step"))
        if type(note["by_clock"]) is bool and is_mark(note["mark"]):
            return note
    return None


def _remove_older_by_clock(newest: Path) -> None:
    """Remove the checkpoints that this training has made by the clock, but for the newest."""
    mine = run_note(newest) or {}
    for folder in newest.parent.iterdir():
        other = run_note(folder) or {"by_clock": False}
        same = all(other.get(key) == mine.get(key) for key in ("session", "training"))
        if same and other["by_clock"] and folder != newest:
            _remove(folder)


def read(folder: str | Path) -> tuple[SessionConfig, dict[str, Any]]:
    """Read a checkpoint's configuration and state, after comparing all files with the manifest.

    Raises:
        CheckpointError: it is none, damaged, or of another format.
    """
    folder = Path(folder)
    manifest.read(folder)
    try:
        state = read_object(folder / STATE, LONGEST_STATE)
        TrainState.check(state)
    except KeyError as error:
        raise CheckpointError(f"{folder / STATE} is damaged: it lacks {error}.") from error
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged: {error}.") from error
    _check_values(folder)
    return SessionConfig.load(folder / CONFIG), state


def _check_values(folder: Path) -> None:
    """Raise CheckpointError for weights, samples or a batch that no session can go on with."""
    try:
        values.check_trainer(folder / TRAINER)
        _last(folder)
    except (OSError, ValueError, KeyError, DataError) as error:
        raise CheckpointError(
            f"The checkpoint {folder} holds what cannot be: {error}.",
            why="Nothing of it was used; a session that runs is as it was.",
            fix="load an earlier one.",
        ) from error


def _last(folder: Path) -> tuple[Rollout | None, Batch | None]:
    """The last rollout and batch, as far as they were written. Raises DataError."""
    rollout, batch = folder / LAST_ROLLOUT, folder / LAST_BATCH
    return (
        Rollout.load(rollout) if rollout.is_file() else None,
        read_batch(batch) if batch.is_file() else None,
    )


def refuse_code(config: SessionConfig, folder: str | Path) -> None:
    """Raise CheckpointError for settings that would run Python code of a model."""
    if config.model.trust_remote_code or config.engine.extra.get("trust_remote_code"):
        raise CheckpointError(
            f"The checkpoint {folder} asks for Python code that comes with the model "
            f"{config.model.name!r}.",
            why="A checkpoint is data; that it was saved with model.trust_remote_code is no reason "
            "to run code on this machine.",
            fix="if you trust the model's authors: RLSession.load(path, trust_remote_code=True).",
        )


def restore(state: TrainState, stack: Stack, folder: Path, row: dict[str, Any]) -> None:
    """Restore a session to a checkpoint, engine included.

    Raises:
        CheckpointError, DataError: it cannot be read, or belongs to something else; the session is
            as it was.
    """
    last_rollout, last_batch = _last(folder)
    _refuse_other_adapters(state.config, stack, folder)
    move_to(state, stack, row, lambda: stack.load(str(folder.absolute() / TRAINER)))
    state.last_rollout, state.last_batch, state.trained_batch = last_rollout, last_batch, None
    state.saved = state.step


def _refuse_other_adapters(config: SessionConfig, stack: Stack, folder: Path) -> None:
    """Raise CheckpointError for adapters that would be added to other weights, or otherwise."""
    own, there = config.model.lora, SessionConfig.load(folder / CONFIG).model.lora
    if (own is None) != (there is None):
        trains = {True: "all weights", False: "adapters (model.lora)"}
        raise CheckpointError(
            f"The session of the checkpoint {folder} trains {trains[there is None]}, and this one "
            f"{trains[own is None]}.",
            fix=f"close this one, and continue that: RLSession.load({str(folder)!r}).",
        )
    if own is None or there is None:
        return
    differ = {"load_in_4bit", "r", "lora_alpha", "use_rslora", "target_modules", "modules_to_save"}
    if changed := sorted(name for name in differ if getattr(own, name) != getattr(there, name)):
        name = changed[0]
        raise CheckpointError(
            f"The adapters of the checkpoint {folder} were made with model.lora.{name} "
            f"{getattr(there, name)}, and this session's have {getattr(own, name)}.",
            why="The same numbers would be another model.",
            fix=f"set model.lora.{name} to what it was.",
        )
    if manifest.peek(folder).get(BASE) != weights_digest(stack.model.path):
        raise CheckpointError(
            f"The checkpoint {folder} holds adapters to other weights than those of "
            f"{stack.model.path}.",
            why="It has no weights but theirs, and the model's files have changed since.",
            fix="set model.name to the model that it was trained with.",
        )


def move_to(
    state: TrainState, stack: Stack, row: Mapping[str, Any], load_trainers: Callable[[], None]
) -> None:
    """Move a session to a state, all of it or nothing.

    Args:
        state: the session's.
        stack: its trainers are at the same point afterwards, and the engine has their weights.
        row: what `TrainState.to_json` gave.
        load_trainers: brings the trainers there, and leaves them alone if it raises.
    """
    before = state.to_json(stack.trainers)
    with held():
        try:
            state.load_json(row, stack.trainers)
            load_trainers()
        except (KeyError, TypeError, ValueError) as error:
            state.load_json(before, stack.trainers)
            raise CheckpointError(
                f"The state of the session is damaged: {type(error).__name__} {error}."
            ) from error
        except BaseException:
            state.load_json(before, stack.trainers)
            raise
        # Numbers that were given since stay given: other weights had them.
        newest = max(int(before["newest_version"]), int(row["newest_version"]))
        stack.trainers.newest_version = newest
        stack.sync(stack.trainers.version)
