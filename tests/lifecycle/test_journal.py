"""The journal: what another process reads of a session is what the session was."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import SessionConfig
from kit.checkpoint.snapshots import SnapshotStore
from kit.checkpoint.state import TrainState
from kit.data import load_prompts
from kit.data.stream import PromptStream
from kit.lifecycle import journal


def a_state() -> TrainState:
    config = SessionConfig.preset("tiny")
    state = TrainState(config)
    state.stream = PromptStream(load_prompts(config.data, split="train"))
    return state


def read(folder: Path) -> TrainState:
    """What a process that attaches has."""
    state, versions = a_state(), SimpleNamespace(version=0, newest_version=0)
    now = journal.noted(folder)["now"]
    journal.restore(folder, now, state, versions, SnapshotStore(state, print), [])
    return state


def test_rows_that_a_full_disk_cut_off_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, versions = a_state(), SimpleNamespace(version=0, newest_version=0)
    notes = journal.Journal(tmp_path, state, versions, SnapshotStore(state, print))
    state.history.append({"step": 0, "reward": 0.0})
    notes.note()
    opened = Path.open

    def full(file: Path, *arguments: Any, **more: Any) -> Any:
        if not file.name.startswith("history"):
            return opened(file, *arguments, **more)
        with opened(file, *arguments, **more) as half:
            half.write('{"rew')
        raise OSError("no space left on device")

    state.history.append({"step": 1, "reward": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.warns(RuntimeWarning, match="no space left"):
            notes.note()
    assert not (notes.folder / journal.STATE).exists()
    state.history.append({"step": 2, "reward": 2.0})
    notes.note()
    assert read(tmp_path).history == state.history


def test_a_row_that_gets_the_metrics_of_an_evaluation_is_written_anew(tmp_path: Path) -> None:
    state, versions = a_state(), SimpleNamespace(version=0, newest_version=0)
    notes = journal.Journal(tmp_path, state, versions, SnapshotStore(state, print))
    state.history += [{"step": 0, "reward": 0.0}, {"step": 1, "reward": 1.0}]
    notes.note()
    state.history[-1] = state.history[-1] | {"eval/addition": 0.5}
    notes.note()
    assert read(tmp_path).history == state.history
