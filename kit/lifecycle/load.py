"""`RLSession.load` and `restore`: a saved state put back, with other settings where asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint import checkpoint
from kit.checkpoint.inputs import Inputs
from kit.config import SessionConfig
from kit.config.changes import with_changes
from kit.errors import CheckpointError
from kit.lifecycle import configure

if TYPE_CHECKING:
    from kit.lifecycle.start import SessionParts
    from kit.reports.status import Snapshot


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that was read, and what to start its session with."""

    folder: Path
    row: Any
    """What the checkpoint says of the session's state."""
    before: SessionConfig
    """Settings that it was saved with."""
    config: SessionConfig
    """Settings to continue with."""
    inputs: dict[str, Any]
    """Data and functions for `RLSession.start`."""

    def restore(self, parts: SessionParts) -> None:
        """Put the state into a session that was started with `config`; closes it on failure."""
        try:
            checkpoint.restore(parts.state, parts.stack, self.folder, self.row)
            configure.log(parts.state, parts.tracker.recorder, self.before)
            parts.note()  # or a kernel that is killed now leaves what nobody can attach to
        except BaseException:
            parts.close()
            raise


def read(
    path: str | Path,
    passed: Mapping[str, Any],
    changes: Mapping[str, Any],
    *,
    trust_remote_code: bool,
) -> Saved:
    """Read a checkpoint, and check that what was a function or rows has been passed again.

    Args:
        path: the directory.
        passed: data and functions that the caller gave.
        changes: settings that are to be others, by their full names.
        trust_remote_code: whether code that the model brings along may run.

    Raises:
        CheckpointError: it cannot be read, or something has to be passed again.
    """
    folder = Path(path)
    before, row = checkpoint.read(folder)
    if not trust_remote_code:
        checkpoint.refuse_code(before, folder)
    config = before
    for name, value in changes.items():
        config = config.replace(name, value)
    inputs = Inputs.of_state(row).again(
        passed,
        CheckpointError,
        f"The session of the checkpoint {folder}",
        f"RLSession.load({str(path)!r}, ...)",
    )
    return Saved(folder, row, before, config, inputs)


def restore_snapshot(
    parts: SessionParts, what: str | Path | Snapshot, changes: Mapping[str, Any]
) -> Snapshot:
    """Undo everything since a snapshot; then change settings. Refuses before anything is undone."""
    state, recorder = parts.state, parts.tracker.recorder
    if changes:
        with_changes(state.config, changes)
    snapshot = parts.snapshots.restore(parts.stack, what)
    if recorder:
        recorder.truncate_to(len(state.history))
    if changes:
        configure.configure(state, parts.use, recorder, changes)
    return snapshot
