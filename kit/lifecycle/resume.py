"""Resuming a run: each training continues from its newest checkpoint.

    first attempt    evaluate ── train: 0 1 2 3 4 5 6 (killed)
                                          └ saved └ saved
    resumed          evaluate ── train:             4 5 6 7 8 9 ── evaluate ── close

The notebook runs again from its top, with the same source and the same parameters, so that all its
variables are there. What comes before a training gives what it gave before, since the same seed
gives the same run. When the training begins, the session is put where the newest checkpoint of this
very training was made (the same session, the same call of `train`), the run's files say again what
they said then, and only the steps after it are trained. A loop that a notebook writes itself is a
training too where `session.steps(n)` counts it; without that its steps are made again.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Collection
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint import checkpoint
from kit.config import SessionConfig
from kit.config.changes import CHANGEABLE, full_names, values, with_changes
from kit.errors import CheckpointError
from kit.lifecycle.configure import Use, configure
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


def begin_training(
    state: TrainState, stack: Stack, recorder: Recorder, use: Use, total: int
) -> int:
    """Record that a training begins, and load its newest checkpoint, if there is one.

    Settings that `kit run --resume --set` gave are changed where the first training continues.

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
            saved = checkpoint.read(folder)
        except CheckpointError as error:
            warnings.warn(f"An older checkpoint is taken. {error}", RuntimeWarning, stacklevel=2)
            continue
        with held():
            load(state, stack, use, folder, saved, key.begin, recorder.settings.changes)
            recorder.restore(note["mark"])
        loaded = str(folder.relative_to(recorder.folder))
        break
    if recorder.settings.changes and recorder.trainings == 1:
        configure(state, use, recorder, recorder.settings.changes)
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


def load(
    state: TrainState,
    stack: Stack,
    use: Use,
    folder: Path,
    saved: tuple[SessionConfig, dict[str, Any]],
    begin: int = 0,
    changes: Collection[str] = (),
) -> None:
    """Load a checkpoint into the session that its notebook has started anew.

    Args:
        state: the session's.
        stack: the session's.
        use: has the session go on with other settings.
        folder: the checkpoint.
        saved: what `checkpoint.read` gave of it.
        begin: the step at which its training began; what was changed while it ran may differ.
        changes: names of settings that are changed on purpose, which may differ too.

    Raises:
        CheckpointError: the session has other settings, data or functions than it had.
    """
    config, row = saved
    config = config.model_copy(update={"name": state.config.name})
    logged = {each["setting"] for each in row.get("changes", ()) if each["step"] >= begin}
    taken = values(config, CHANGEABLE & (logged | full_names(dict.fromkeys(changes)).keys()))
    if config != with_changes(state.config, taken):
        raise CheckpointError(
            f"The session has other settings than it had when {folder} was made.",
            why="A resumed run would end with other numbers than an uninterrupted one.",
            fix="start a new run, or continue from the checkpoint by hand: RLSession.load(path).",
        )
    if row.get("inputs", (own := dict(state.inputs.described))) != own:
        raise CheckpointError(
            "The session was started with other data, reward or functions than it was when "
            f"{folder} was made.",
            why=f"Then: {row['inputs']}. Now: {own}. A resumed run would end with other numbers "
            "than an uninterrupted one.",
            fix="put back what has changed (a module that the notebook imports?), start a new run, "
            "or continue from the checkpoint by hand: RLSession.load(path).",
        )
    checkpoint.restore(state, stack, folder, row)
    use(config)


def _note_continued(recorder: Recorder, key: TrainingKey, step: int, folder: str | None) -> None:
    attempt = recorder.settings.attempt
    row = {"attempt": attempt, "session": key.session, "training": key.training}
    text = json.dumps(row | {"step": step, "checkpoint": folder}) + "\n"
    root = Path(recorder.settings.folder or recorder.folder)
    with suppress(OSError), (root / CONTINUED).open("a", encoding="utf-8") as file:
        file.write(text)
