"""`Task`: what a row's process is told, as a file; and the settings of its session."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.device_parts.rows import Row
from benchmarks.device_parts.shapes import SHAPES
from benchmarks.gpu_parts.workload import Workload
from kit import SessionConfig

LEASE = 20.0
"""Seconds after which a session's processes end by themselves where their row was killed."""


@dataclass(frozen=True, slots=True)
class Task:
    """One row, and where its files are."""

    row: Row
    device: str
    model: str
    """The directory of the weights, or `tiny`."""
    folder: str
    """Of the row: its task, its result, its log."""
    batch: str
    """File of the samples that every row of this shape trains on first."""
    deadline: float
    """In seconds of `time.time`."""
    prompts: int
    """Of a step."""
    makes_batch: bool = False
    """Whether it writes that file; the others wait for it."""
    steps: int = 3
    settings: dict[str, Any] = field(default_factory=dict)
    """Further settings of the session, by their full names."""

    @property
    def file(self) -> Path:
        """Where the task itself is."""
        return Path(self.folder) / "task.json"

    @property
    def result(self) -> Path:
        """Where the row's process writes what it has measured."""
        return Path(self.folder) / "result.json"

    @property
    def log(self) -> Path:
        """Where its output goes."""
        return Path(self.folder) / "log.txt"

    @property
    def no_batch(self) -> Path:
        """A file that is there when the row that was to make the batch has ended without it."""
        return Path(f"{self.batch}.none")

    def write(self) -> None:
        """Into its file; a result of an earlier run goes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.result.unlink(missing_ok=True)
        self.file.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    @classmethod
    def read(cls, file: Path) -> Self:
        """What `write` wrote."""
        values = json.loads(file.read_text(encoding="utf-8"))
        return cls(**values | {"row": Row(**values["row"])})

    def workload(self) -> Workload:
        """Prompts and lengths."""
        shape = SHAPES[self.row.shape]
        return Workload(
            self.model,
            self.device,
            prompts=self.prompts,
            group=shape.group,
            prompt_tokens=shape.prompt_tokens,
            response_tokens=shape.response_tokens,
        )

    def config(self) -> SessionConfig:
        """Of the session: the same for all rows of a shape, but for the devices."""
        config = self.workload().config(stack={"lease": LEASE})
        for key, value in {
            "name": f"devices-{self.row.key}",
            "training.num_trainers": self.row.trainers,
            "engine.replicas": self.row.replicas,
            "engine.tensor_parallel": self.row.tensor_parallel,
            "cluster.colocate": self.row.way != "apart",
            **self.settings,
        }.items():
            config = config.replace(key, value)
        return config
