"""What a resumed run does in its kernel: each training goes on from its newest checkpoint.

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
import shutil
import time
import warnings
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import CheckpointError
from kit.tracking.recorder import Place, Recorder
from kit.tracking.run_folder import ATTEMPTS, CHECKPOINTS
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.lifecycle.start import Lifecycle


NOTE = "run.json"
"""In a checkpoint: which training of the run it belongs to, and where the run's files ended."""


CONTINUED = f"{ATTEMPTS}/continued.jsonl"
"""In the run's folder: which trainings went on, and from where."""


SAVE_SECONDS = 300.0
"""How long a batch run trains between two checkpoints, where nothing else is said."""


SHARE = 0.02
"""Of the time, at most, that goes into those checkpoints."""


class Pace:
    """When a batch run saves by the clock."""

    def __init__(self) -> None:
        """From now on."""
        self._last = time.monotonic()
        self._wait = SAVE_SECONDS

    def due(self) -> bool:
        """Is it time?"""
        return time.monotonic() - self._last >= self._wait

    def saved(self, seconds: float) -> None:
        """A checkpoint was written just now, in so many seconds."""
        self._last, self._wait = time.monotonic(), max(SAVE_SECONDS, seconds / SHARE)


def begin_training(session: Lifecycle, total: int) -> int:
    """Say that a training begins; how many of its steps a checkpoint holds, which is loaded.

    Args:
        session: which trains.
        total: how many steps.

    Raises:
        CheckpointError: the notebook starts its session with other settings than it did.
    """
    recorder = session._recorder
    if recorder is None:
        return 0
    recorder.trainings += 1
    recorder.place = Place(recorder.session, recorder.trainings, session.step_count)
    if recorder.settings.attempt == 1:
        return 0
    found = _newest(recorder, recorder.place, total)
    if found is not None:
        _load(session, recorder, *found)
    checkpoint = str(found[0].relative_to(recorder.folder)) if found else None
    _tell(recorder, session.step_count, checkpoint)
    return session.step_count - recorder.place.begin


def end_training(session: Lifecycle) -> None:
    """Say that it has ended: what is saved from here on belongs to no training."""
    if session._recorder:
        session._recorder.place = None


def note(session: Lifecycle, folder: Path, by_clock: bool) -> None:
    """Write into a checkpoint where the run stands, if it is one that a training makes."""
    recorder = session._recorder
    if recorder is None or recorder.place is None:
        return
    what = asdict(recorder.place) | {
        "step": session.step_count,
        "by_clock": by_clock,
        "mark": recorder.mark(),
    }
    (folder / NOTE).write_text(json.dumps(what), encoding="utf-8")


def remove_older(newest: Path) -> None:
    """Of the checkpoints that this training has made by the clock, the newest is enough."""
    from kit.checkpoint.manifest import MANIFEST

    mine = _noted(newest) or {}
    for folder in newest.parent.iterdir():
        other = _noted(folder) or {"by_clock": False}
        same = all(other.get(key) == mine.get(key) for key in ("session", "training"))
        if same and other["by_clock"] and folder != newest:
            (folder / MANIFEST).unlink(missing_ok=True)  # it is no checkpoint from here on
            shutil.rmtree(folder, ignore_errors=True)


def _newest(recorder: Recorder, place: Place, total: int) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint of this training, and its note."""
    root = recorder.folder / CHECKPOINTS
    found = []
    for folder in root.iterdir() if root.is_dir() else ():
        what = _noted(folder)
        if not what or any(what[key] != value for key, value in asdict(place).items()):
            continue
        if place.begin < what["step"] <= place.begin + total and recorder.holds(what["mark"]):
            found.append((int(what["step"]), folder, what))
    for _, folder, what in sorted(found, key=lambda each: each[0], reverse=True):
        if _whole(folder):
            return folder, what
    return None


def _whole(folder: Path) -> bool:
    from kit.checkpoint import checkpoint

    try:
        checkpoint.read(folder)
    except CheckpointError as error:
        warnings.warn(f"An older checkpoint is taken. {error}", RuntimeWarning, stacklevel=2)
        return False
    return True


def _noted(folder: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError):
        found = json.loads((folder / NOTE).read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else None
    return None


def _load(session: Lifecycle, recorder: Recorder, folder: Path, what: dict[str, Any]) -> None:
    from kit.checkpoint import checkpoint

    config, state = checkpoint.read(folder)
    if config.model_copy(update={"name": session.config.name}) != session.config:
        raise CheckpointError(
            f"The session has other settings than it had when {folder} was made.",
            why="A resumed run would end with other numbers than an uninterrupted one.",
            fix="start a new run, or continue from the checkpoint by hand: RLSession.load(path).",
        )
    with held():
        checkpoint.restore(session, session._running, folder, state)
        recorder.go_on(what["mark"])
    session._note()


def _tell(recorder: Recorder, step: int, checkpoint: str | None) -> None:
    place, attempt = recorder.place, recorder.settings.attempt
    assert place is not None
    row = {"attempt": attempt, "session": place.session, "training": place.training}
    text = json.dumps(row | {"step": step, "checkpoint": checkpoint}) + "\n"
    root = Path(recorder.settings.folder or recorder.folder)
    with suppress(OSError), (root / CONTINUED).open("a", encoding="utf-8") as file:
        file.write(text)
