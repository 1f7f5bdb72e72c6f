"""Changes of settings while a session runs: applied together, and written down.

A change is in `TrainState.changes`, which checkpoints hold, and in the run's `changes.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.config.changes import EVERY, values, with_changes
from kit.errors import ConfigError
from kit.reports.status import SettingsChange
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.checkpoint.state import TrainState
    from kit.tracking.recorder import Recorder

Use = Callable[[SessionConfig], None]
"""Has every part of a session go on with other settings."""


def configure(
    state: TrainState, use: Use, recorder: Recorder | None, changes: Mapping[str, Any]
) -> SettingsChange:
    """Change settings of a running session, all of them or none.

    Raises:
        ConfigError: a setting that cannot change while a session runs, or a value that cannot be.
    """
    if not changes:
        raise ConfigError(
            "There is nothing to change.",
            fix="name a setting: session.configure(learning_rate=1e-5), or "
            'session.configure({"rollout.temperature": 0.8}).',
        )
    before = state.config
    after = with_changes(before, changes)
    with held():
        use(after)
        return log(state, recorder, before)


def log(state: TrainState, recorder: Recorder | None, before: SessionConfig) -> SettingsChange:
    """Write down how the settings differ from those of before."""
    old, new = values(before, EVERY), values(state.config, EVERY)
    rows = [
        {"step": state.step, "setting": name, "from": old[name], "to": new[name]}
        for name in sorted(EVERY)
        if old[name] != new[name]
    ]
    state.changes += rows
    if recorder:
        recorder.changes(rows)
    return SettingsChange(state.step, tuple((r["setting"], r["from"], r["to"]) for r in rows))
