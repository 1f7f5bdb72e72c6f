"""What an earlier version wrote is read by this one; `fixtures/version_0_1/README.md` has it."""

from __future__ import annotations

import hashlib
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kit import RLSession, SessionConfig
from kit.checkpoint.inputs import Inputs
from kit.checkpoint.snapshots import SnapshotStore
from kit.checkpoint.state import TrainState
from kit.data.stream import PromptStream
from kit.errors import RunError
from kit.lifecycle import journal
from kit.reports.runs import read_record
from kit.runs import compare_runs, resume_notebook
from kit.runs.index import find_runs
from kit.samples import Sample
from kit.tracking.run_folder import read_rows

WRITTEN = Path(__file__).parent / "fixtures" / "version_0_1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
ENDED, KILLED = sorted((WRITTEN / "runs").iterdir())


def luck(sample: Sample) -> float:
    return float(sum(sample.response_tokens) % 2)


@pytest.fixture(scope="module")
def loaded() -> Iterator[RLSession]:
    """A session that goes on from the checkpoint."""
    if other := RLSession.current():
        other.close(keep_warm=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(WRITTEN)  # the settings name the model by its folder here
        with RLSession.load("checkpoint", reward=luck) as session:
            yield session


def state(session: RLSession, folder: Path) -> dict[str, Any]:
    """As `expected.json` has it."""
    session.export_hf(folder, dtype="float32")
    weights = load_file(folder / "model.safetensors")
    assert session.last_rollout is not None
    return {
        "step_count": session.step_count,
        "weight_version": session.weight_version,
        "history": [{k: v for k, v in row.items() if k != "step"} for row in session.history],
        "responses": [sample.response for sample in session.last_rollout],
        "weights": {name: digest(weights[name]) for name in sorted(weights)},
    }


def digest(weight: torch.Tensor) -> str:
    data = weight.contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def test_a_checkpoint_loads_with_weights_counters_metrics_and_last_rollout(
    loaded: RLSession, tmp_path: Path
) -> None:
    # Noted already, so that the session can be attached if its kernel is killed now.
    noted = journal.noted(loaded.debug.stack.cluster.directory)["now"]
    assert noted["step_count"] == EXPECTED["checkpoint"]["step_count"]
    assert state(loaded, tmp_path / "model") == EXPECTED["checkpoint"]
    assert len(loaded.debug.state.buffer) == 2


def test_a_snapshot_in_files_is_restored_and_training_goes_on(
    loaded: RLSession, tmp_path: Path
) -> None:
    loaded.restore(Path("snapshot"))
    assert state(loaded, tmp_path / "two") == EXPECTED["snapshot"]
    assert loaded.step().update.applied
    loaded.restore(Path("checkpoint"))
    assert state(loaded, tmp_path / "three") == EXPECTED["checkpoint"]


def test_the_notes_of_a_session_are_read(loaded: RLSession) -> None:
    folder = WRITTEN / "journal"
    now = journal.noted(folder)["now"]
    config = SessionConfig(**journal.settings(folder, now))
    assert config == SessionConfig.load(WRITTEN / "checkpoint" / "config.yaml")
    assert Inputs.of_state(journal.started_with(folder)).described == {"reward": {"object": ""}}
    state, versions = TrainState(config), SimpleNamespace(version=0, newest_version=0)
    state.stream = PromptStream(loaded.debug.sampler.train, config.seed)
    journal.restore(folder, now, state, versions, SnapshotStore(state, print), [])
    assert (state.step, versions.version, len(state.buffer)) == (3, 3, 2)
    assert [row.pop("step") for row in state.history] == [0, 1, 2]
    assert state.history == EXPECTED["checkpoint"]["history"]
    assert state.last_rollout is not None
    assert [s.response for s in state.last_rollout] == EXPECTED["checkpoint"]["responses"]


def test_a_recorded_rollout_is_replayed(loaded: RLSession) -> None:
    rollout = loaded.replay(ENDED, step=1)
    assert [luck(sample) for sample in rollout] == [sample.reward for sample in rollout]


def test_runs_are_listed_read_and_compared() -> None:
    ended, killed = reversed(find_runs(WRITTEN / "runs"))
    assert (ended.status, ended.steps, ended.notebook) == ("completed", 2, "luck")
    assert (killed.name, killed.steps) == (KILLED.name, 3)
    assert read_record(ENDED).headline["steps"] == len(read_rows(ENDED / "metrics.jsonl")) == 2
    shown = str(compare_runs([ENDED, KILLED]))
    assert "lr" in shown
    with pytest.raises(RunError, match="is completed"):
        resume_notebook(ENDED)


@pytest.mark.slow
def test_a_run_that_was_killed_is_resumed_from_its_checkpoint(tmp_path: Path) -> None:
    if other := RLSession.current():  # it has the name that the run's session takes
        other.close(keep_warm=True)
    for name in ("model", "luck.ipynb"):
        copy = shutil.copytree if (WRITTEN / name).is_dir() else shutil.copy
        copy(WRITTEN / name, tmp_path / name)
    folder = shutil.copytree(KILLED, tmp_path / KILLED.name)
    record = json.loads((folder / "result.json").read_text())
    record["directory"] = str(tmp_path)
    record["parameters"]["dies_after"] = record["given"]["dies_after"] = -1
    record["process"]["host"] = socket.gethostname()  # where it lives no more
    (folder / "result.json").write_text(json.dumps(record))
    assert resume_notebook(folder).status == "completed"
    rows = read_rows(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert rows[:2] == read_rows(KILLED / "metrics.jsonl")[:2]
    assert read_record(folder).lineage.continued[0].step == 2
