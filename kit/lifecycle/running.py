"""The session that runs in this process: which one it is, and what becomes of it at a new start.

A process drives one stack at a time. In a script or a batch run a second start is refused. In a
notebook somebody has changed a setting and runs the cells again: the session of before ends, and
one line says so. What took long to train and was never saved is saved first.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kit.checkpoint import checkpoint
from kit.errors import KitError, SessionError
from kit.utils.formatting import count, duration
from kit.viz.live.frontend import frontend

if TYPE_CHECKING:
    from kit.lifecycle.start import SessionParts
    from kit.stack.stack import Stack


KEPT_SECONDS = 600.0
"""Training that took so long is saved before a new start ends its session."""

_running: set[SessionParts] = set()
"""They live until they are closed: the variable that held the session may have been overwritten."""


def add(parts: SessionParts) -> None:
    """A session runs from here on, or is about to."""
    _running.add(parts)


def discard(parts: SessionParts) -> None:
    """A session runs no more."""
    _running.discard(parts)


def here() -> SessionParts | None:
    """Session that runs in this process, or is about to; None where there is none."""
    return next((parts for parts in _running if not parts.is_inherited), None)


def refuse_a_second_one() -> None:
    """Raise SessionError if one already runs in this process, or in that which has forked it."""
    if other := _other():
        raise SessionError(
            f"The session {other.state.config.name!r} is running in this process already.",
            why="A process drives one stack at a time.",
            fix="go on with it (`session = RLSession.current()`), or end it first: "
            "`RLSession.current().close()`.",
        )


def to_be_replaced() -> SessionParts | None:
    """Session that ends for one that starts now; None where none runs.

    Raises:
        SessionError: one runs, and nobody is there who could have meant it to end.
    """
    if frontend() != "live":
        refuse_a_second_one()
        return None
    other = _other()
    if other and other.phase != "running":
        refuse_a_second_one()  # another thread is starting it
    return other


def replace(parts: SessionParts, stack: Stack) -> None:
    """End a session for one that is about to start, and say so in one line.

    Its processes are left to the new one where that has the same engine settings.

    Args:
        parts: of the session that runs.
        stack: the new one's, which is not started.

    Raises:
        SessionError: much of it was never saved, and cannot be. It runs on.
    """
    from kit.stack.actors import fingerprint

    name, forks = parts.state.config.name, parts.forks.items()
    lost = [_goes_with(each) for each in (parts, *parts.forks.values())]
    lines = [f"The session {name!r} ended for this one{lost[0]}."]
    lines += [
        f"The fork {fork!r} ended with it{words}."
        for (fork, _), words in zip(forks, lost[1:], strict=True)
    ]
    same = parts.stack.cluster.entry.fingerprint == fingerprint(stack.settings)
    parts.close(keep_warm=same)
    print("\n".join(lines))


def _other() -> SessionParts | None:
    """The session of this process. One that only a checkpoint can bring back is closed."""
    for parts in _running:
        parts.refuse_in_fork()
    other = here()
    if other and other.is_lost:
        other.close()
        return None
    return other


def _goes_with(parts: SessionParts) -> str:
    """What goes with a session, as the end of a sentence; what took long to train is saved."""
    unsaved = parts.state.unsaved
    steps, seconds = len(unsaved), sum(row.get("perf/step_time", 0.0) for row in unsaved)
    saved = _saved(parts) if seconds >= KEPT_SECONDS else None
    later = [kept.name for kept in parts.snapshots.values() if kept.step and not kept.folder]
    return _lost(steps, seconds, later, saved)


def _lost(steps: int, seconds: float, snapshots: list[str], saved: Path | None) -> str:
    """What went with a session, as the end of a sentence."""
    if saved:
        last, be = ("step", "is") if steps == 1 else (f"{steps} steps", "are")
        took = f"its last {last}, which took {duration(seconds)}"
        words = f"; {took}, had not been saved and {be} in {saved} (RLSession.load)"
    elif steps:
        last, them = ("step", "it") if steps == 1 else (f"{steps} steps", "them")
        words = f", without its last {last}: nobody had saved {them}"
    else:
        words = ""
    if snapshots:
        words += f"; with it went {'the snapshot' if len(snapshots) == 1 else 'the snapshots'} "
        words += ", ".join(map(repr, snapshots))
    return words


def _saved(parts: SessionParts) -> Path:
    """Save a session where no other checkpoint is; its training ends after the step under way."""
    state, training = parts.state, parts.lock.training
    try:
        while training and not training.close(1.0):
            pass
        recorder = parts.tracker.recorder
        first = checkpoint.default_path(state, recorder, numbered=True)
        path, number = first, 1
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}-{number}")
        with parts.turn():
            return checkpoint.save(state, parts.stack, path, recorder=recorder)
    except KitError as error:
        raise SessionError(
            f"The session {state.config.name!r} would end for a new one; but "
            f"{count(len(state.unsaved), 'step')} of it were never saved, and cannot be now.",
            why=str(error),
            fix="session.save(path) somewhere else; or end it without them: "
            "`RLSession.current().close()`. Then start again.",
        ) from error
