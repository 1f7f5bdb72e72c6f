"""Where things stand: a session, a training under way, snapshots, living sessions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kit.config import LoraConfig, TrainingConfig
from kit.errors import SessionError, did_you_mean
from kit.reports.training import Metrics, StepReport
from kit.samples import Batch, Rollout
from kit.utils.display import Shown


@dataclass(frozen=True, slots=True)
class FirstPrompt:
    """The first prompt of the data as the model gets it, and what is odd about it."""

    tokens: tuple[int, ...]
    texts: tuple[str, ...]
    """One a token."""
    warnings: tuple[str, ...] = ()
    """What is likely wrong with it, and so with all others."""
    notes: tuple[str, ...] = ()
    """What is right and good to know."""


@dataclass(frozen=True, slots=True)
class SessionState(Shown):
    """Where a session stands; a session shows itself with it."""

    name: str
    state: str
    """`not started`, `running` or `closed`."""
    model: str
    parameters: int | None
    device: str
    dtype: str
    step: int
    """Updates applied."""
    planned: int
    """`training.num_rollout`."""
    weight_version: int
    """The trainer's."""
    engine_version: int
    last_reward: float | None
    """Mean reward of the last rollout; None before it is scored."""
    rewards: tuple[float, ...] = ()
    """Mean reward of each step so far."""
    waiting: int = 0
    """Groups that wait to be continued."""
    host_memory: int | None = None
    """Bytes that the stack's processes hold for themselves; None where there are none."""
    next_calls: tuple[tuple[str, str], ...] = ()
    """(call, what it does), the most likely one first."""
    trained: int | None = None
    """Parameters that are trained, where those are not all: adapters."""
    lora: LoraConfig | None = None
    """How the adapters are made; None trains all parameters."""
    drafts: str = ""
    """What drafts for the engine, in words; empty where nothing does."""
    quantized: str = ""
    """In which sides linear layers are quantised and how, and what corrects for a difference."""
    fork_of: str = ""
    """Name of the session that it shares a stack with, as a fork."""
    forks: tuple[str, ...] = ()
    """Names of the forks that share its stack, but for itself."""
    first_prompt: FirstPrompt | None = None
    """Shown until the first step is done; its warnings are shown as long as there are some."""


TrainingState = Literal["ready", "running", "paused", "stopped", "finished", "failed"]
"""`ready` is paused before the first step; the last three are ends."""


@dataclass(frozen=True, slots=True)
class TrainingStatus(Shown):
    """A training at one moment. Shows itself as the picture that the dashboard draws."""

    state: TrainingState
    total: int
    """Steps that were asked for."""
    done: int = 0
    asked: Literal["", "run", "pause", "stop"] = ""
    """What was asked for and waits: for the step under way to end, or for a verb."""
    step: int = 0
    """Updates that the session has applied, those before this training included."""
    history: tuple[Metrics, ...] = ()
    """One row of metrics a step, from the session's first step on."""
    last: StepReport | None = None
    """The newest step of this training."""
    step_seconds: float = math.nan
    """Mean over the last steps, evaluations included."""
    stopped: str = ""
    """Why it ended early; empty where it did not."""
    error: str = ""
    """What the exception said, where it failed."""

    @property
    def ended(self) -> bool:
        """Whether there will be no further step."""
        return self.state in ("stopped", "finished", "failed")

    @property
    def seconds_left(self) -> float:
        """Seconds until all steps are done, at the pace of the last ones; NaN before the first."""
        return self.step_seconds * (self.total - self.done)


@dataclass(frozen=True, slots=True)
class Snapshot(Shown):
    """A moment of a session that `restore` can bring back, bit by bit."""

    name: str
    step: int
    """Updates applied by then."""
    weight_version: int
    reward: float | None
    """Mean reward of the last step by then; None before the first."""
    bytes: int
    """Size in host memory, or on disk."""
    made: float
    """Seconds since 1970."""
    folder: Path | None = None
    """Where it is on disk; None in host memory."""
    training: TrainingConfig = field(default_factory=TrainingConfig, repr=False)
    """The settings that the training had."""
    rollout: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Those of `rollout` that can change while a session runs, by their full names."""
    state: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """Counters, data position, buffer, metrics; see `kit.checkpoint.state`."""
    last_rollout: Rollout | None = field(default=None, repr=False, compare=False)
    last_batch: Batch | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class SettingsChange(Shown):
    """Settings that a running session continues with from now on."""

    step: int
    """Updates applied by then."""
    changes: tuple[tuple[str, Any, Any], ...]
    """(full name, value before, value now); empty where all of them were so already."""


@dataclass(frozen=True, slots=True)
class Snapshots(Shown, Sequence[Snapshot]):
    """All snapshots of a session, the oldest first."""

    all: tuple[Snapshot, ...]
    now: int
    """The weight version that the trainer holds."""

    def __len__(self) -> int:
        return len(self.all)

    def __getitem__(self, index: Any) -> Any:
        """Snapshot by index or by name."""
        if isinstance(index, str):
            return find({s.name: s for s in self.all}, index)
        return self.all[index]

    def __iter__(self) -> Iterator[Snapshot]:
        return iter(self.all)

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory that all snapshots hold together."""
        return sum(s.bytes for s in self.all if s.folder is None)


def find(snapshots: Mapping[str, Snapshot], name: str) -> Snapshot:
    """The snapshot of a name. Raises SessionError, which suggests one that exists."""
    if name not in snapshots:
        raise SessionError(
            f"There is no snapshot {name!r}.",
            fix=did_you_mean(name, snapshots)
            if snapshots
            else "take one first: session.snapshot(name). There is none yet.",
        )
    return snapshots[name]


@dataclass(frozen=True, slots=True)
class LivingSession:
    """A session whose processes live, whoever drives them."""

    name: str
    id: str
    """The id of its stack."""
    device: str
    step: int | None
    """Updates applied; None while it starts or is warm."""
    driver: int | None
    """The process that drives it; None where that is gone."""
    folder: str
    """Where that process works or worked."""
    warm: bool
    """Whether it was closed and left for the next start."""
    ends_in: float | None
    """Seconds until it ends by itself; None while it is driven."""
    age: float
    """Seconds since it started."""
    processes: int
    memory: int
    """Bytes that its processes have to themselves."""
    directory: Path

    @property
    def can_be_attached(self) -> bool:
        """Whether it waits for a kernel."""
        return self.driver is None and not self.warm and self.step is not None


@dataclass(frozen=True, slots=True)
class Sessions(Shown):
    """All sessions of a user on a machine, the oldest first."""

    sessions: tuple[LivingSession, ...]

    def __len__(self) -> int:
        return len(self.sessions)

    def __getitem__(self, index: int) -> LivingSession:
        return self.sessions[index]
