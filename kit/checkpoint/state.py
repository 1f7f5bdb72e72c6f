"""`TrainState`: a session without its weights; shared by checkpoint, journal and snapshots.

to_json ──► state.json of a checkpoint, `Snapshot.state`
counters ─► the journal, which keeps history and buffer in files of their own
load_json ◄─ all three
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from kit.checkpoint import values
from kit.checkpoint.inputs import Inputs
from kit.config import SessionConfig
from kit.data.buffer import RolloutBuffer
from kit.data.stream import PromptStream
from kit.reports import REWARD, STEP, Metrics, StepReport
from kit.samples import Batch, Rollout


class WeightVersions(Protocol):
    """Source of weight versions: the trainers."""

    version: int
    newest_version: int


@dataclass(slots=True, eq=False)
class TrainState:
    """Settings, counters, data position, metrics, last rollout and batch.

    The numbers of the weights are the trainers', which change them; `to_json` and `load_json` are
    given them.
    """

    config: SessionConfig
    step: int = 0
    """Updates applied so far."""
    rollouts_drawn: int = 0
    """Draws of responses so far; each takes its randomness from the seed and its number."""
    history: list[Metrics] = field(default_factory=list)
    """One row of metrics a step, with its number under `step`."""
    unsynced: int | None = None
    """The step that was made by itself, while the engine does not have its weights yet."""
    buffer: RolloutBuffer = field(default_factory=RolloutBuffer)
    """Unfinished groups that wait to be continued."""
    last_rollout: Rollout | None = None
    last_batch: Batch | None = None
    """What `update` was last given, also where it was refused."""
    trained_batch: Batch | None = None
    """The last one that was trained on; None where that was undone, or in an earlier process."""
    last_step: StepReport | None = None
    """The last one whose update was made and handed over, even if interrupted after that."""
    evaluated: int | None = None
    """Version of the weights that were evaluated last."""
    saved: int = 0
    """The step that a checkpoint of this session holds, as far as none was undone since."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that were changed while it ran: `step`, `setting`, `from`, `to`."""
    inputs: Inputs = field(default_factory=Inputs)
    """What was passed to `start` beside the configuration; not part of what is loaded."""
    stream: PromptStream = field(init=False)
    """The order of the training prompts, and the place in it; there once the data is read."""

    @property
    def rewards(self) -> list[float]:
        """Mean reward of each step that has one."""
        return [row[REWARD] for row in self.history if REWARD in row]

    @property
    def unsaved(self) -> list[Metrics]:
        """Rows of the steps that no checkpoint holds."""
        return [row for row in self.history if row[STEP] >= self.saved]

    def twin(self, config: SessionConfig) -> TrainState:
        """Another state that goes on from here with these settings, without a stream yet."""
        return replace(
            self,
            config=config,
            history=list(self.history),
            unsynced=None,
            saved=self.step,  # the steps before are for the other one to save
            buffer=RolloutBuffer(self.buffer),
            changes=list(self.changes),
        )

    def counters(self, versions: WeightVersions) -> dict[str, Any]:
        """The small part of `to_json`: counters, and data position."""
        return {
            "step_count": self.step,
            "weight_version": versions.version,
            "newest_version": versions.newest_version,
            "generations": self.rollouts_drawn,
            "stream": self.stream.state(),
            "inputs": dict(self.inputs.described),
            "changes": list(self.changes),
            "evaluated": self.evaluated,
        }

    def to_json(self, versions: WeightVersions) -> dict[str, Any]:
        """Convert to JSON's types, as far as the data's metadata is made of them."""
        own = {"buffer": self.buffer.state(), "history": list(self.history)}
        return self.counters(versions) | own

    def load_json(self, row: Mapping[str, Any], versions: WeightVersions) -> None:
        """Load what `to_json` returned, all of it or nothing.

        Raises:
            KeyError, TypeError, ValueError: a value is missing or damaged.
            DataError: it belongs to other prompts, or the buffer is damaged.
        """
        step, drawn, *weights = self.check(row)
        history = values.history(row["history"], step - len(row["history"]))
        changes = values.changes(row.get("changes", []))
        place = self.stream.state()
        self.stream.load_state(row["stream"])
        try:
            self.buffer.load_state(row["buffer"])
        except BaseException:
            self.stream.load_state(place)
            raise
        self.step, self.rollouts_drawn, self.history = step, drawn, history
        self.evaluated, self.saved = row.get("evaluated"), min(self.saved, step)
        self.unsynced, self.changes = None, changes
        versions.version, versions.newest_version = weights

    @staticmethod
    def check(row: Mapping[str, Any]) -> list[int]:
        """Look at what `to_json` returned, as far as that takes no data.

        Returns:
            step, draws, and the numbers of the weights.

        Raises:
            KeyError, TypeError, ValueError: a value is missing, or cannot be.
        """
        counted = ("step_count", "generations", "weight_version", "newest_version")
        step, *others = values.whole_numbers(row, counted)
        if row.get("evaluated") is not None:
            values.counter(row, "evaluated")
        values.history(row["history"], step - len(row["history"]))
        values.changes(row.get("changes", []))
        if not isinstance(row.get("inputs", {}), dict):
            raise ValueError("inputs is no mapping")
        if not isinstance(row["stream"], dict) or not isinstance(row["buffer"], list):
            raise ValueError("the place in the data, or the buffer, is of another type")
        return [step, *others]
