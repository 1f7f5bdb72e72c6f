"""Resuming a run: each training continues from its newest checkpoint.

    first attempt    evaluate ── train: 0 1 2 3 4 5 6 (killed)
                                          └ saved └ saved
    resumed          evaluate ── train:             4 5 6 7 8 9 ── evaluate ── close

The notebook runs again from its top, with the same source and the same parameters, so that all its
variables are there. What comes before a training gives what it gave before, since the same seed
gives the same run. When the training begins, the session is put where the newest checkpoint of this
very training was made (the same session, the same call of `train`), the run's files say again what
they said then, and only the steps after it are trained. Steps that a notebook makes by calling
`session.step()` itself are made again.
"""

from __future__ import annotations

import json
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint import checkpoint
from kit.errors import CheckpointError
from kit.tracking.recorder import Recorder, TrainingKey
from kit.tracking.run_folder import ATTEMPTS, CHECKPOINTS
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.checkpoint.state import TrainState
    from kit.stack.stack import Stack


CONTINUED = f"{ATTEMPTS}/continued.jsonl"
"""In the run's folder: which trainings went on, and from where."""
SAVE_SECONDS = 300.0
"""How long a batch run trains between two checkpoints, where nothing else is said."""
SHARE = 0.02
"""Largest share of the time that goes into those checkpoints."""


class CheckpointClock:
    """Clock that says when a batch run saves a checkpoint."""

    def __init__(self) -> None:
        """Start the clock."""
        self._last = time.monotonic()
        self._wait = SAVE_SECONDS

    def due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last >= self._wait

    def saved(self, seconds: float) -> None:
        """Restart after a checkpoint that took so many seconds to write."""
        self._last, self._wait = time.monotonic(), max(SAVE_SECONDS, seconds / SHARE)


def begin_training(state: TrainState, stack: Stack, recorder: Recorder, total: int) -> int:
    """Record that a training begins, and load its newest checkpoint, if there is one.

    Returns:
        How many of its steps the checkpoint held.

    Raises:
        CheckpointError: the notebook starts its session with other settings than it did.
    """
    recorder.trainings += 1
    recorder.training = key = TrainingKey(recorder.session, recorder.trainings, state.step)
    if recorder.settings.attempt == 1:
        return 0
    loaded = None
    for folder, note in _checkpoints(recorder, key, total):
        try:
            config, row = checkpoint.read(folder)
        except CheckpointError as error:
            warnings.warn(f"An older checkpoint is taken. {error}", RuntimeWarning, stacklevel=2)
            continue
        if config.model_copy(update={"name": state.config.name}) != state.config:
            raise CheckpointError(
                f"The session has other settings than it had when {folder} was made.",
                why="A resumed run would end with other numbers than an uninterrupted one.",
                fix="start a new run, or continue from the checkpoint by hand: "
                "RLSession.load(path).",
            )
        with held():
            checkpoint.restore(state, stack, folder, row)
            recorder.restore(note["mark"])
        loaded = str(folder.relative_to(recorder.folder))
        break
    _note_continued(recorder, key, state.step, loaded)
    return state.step - key.begin


def _checkpoints(
    recorder: Recorder, key: TrainingKey, total: int
) -> list[tuple[Path, dict[str, Any]]]:
    """Checkpoints of this training with their notes, the newest first."""
    root = recorder.folder / CHECKPOINTS
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        note = checkpoint.run_note(folder)
        if not note or any(note[name] != value for name, value in asdict(key).items()):
            continue
        if key.begin < note["step"] <= key.begin + total and recorder.holds(note["mark"]):
            found.append((folder, note))
    return sorted(found, key=lambda pair: int(pair[1]["step"]), reverse=True)


def _note_continued(recorder: Recorder, key: TrainingKey, step: int, folder: str | None) -> None:
    attempt = recorder.settings.attempt
    row = {"attempt": attempt, "session": key.session, "training": key.training}
    text = json.dumps(row | {"step": step, "checkpoint": folder}) + "\n"
    root = Path(recorder.settings.folder or recorder.folder)
    with suppress(OSError), (root / CONTINUED).open("a", encoding="utf-8") as file:
        file.write(text)
