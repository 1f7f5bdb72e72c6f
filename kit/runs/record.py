"""What a session writes into a run's folder while it works.

The files are plain JSON lines, so that a run can be followed with `tail -f` and read by anything.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.config import SessionConfig
from kit.reports import EvalReport

RUN_DIR_VARIABLE = "KIT_RUN_DIR"
"""Names the run's folder to the notebook's kernel; `kit run` sets it."""
GROUP_VARIABLE = "KIT_RUN_GROUP"
"""Names runs that follow each other and share a stack; `kit run` of several notebooks sets it."""

CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
CHECKPOINT = "checkpoint"


def current_run() -> Recorder | None:
    """The recorder of the run that this process belongs to; None in an interactive notebook."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    return Recorder(folder) if folder else None


def current_group() -> str:
    """The group of runs that this process belongs to; empty where it belongs to none."""
    return os.environ.get(GROUP_VARIABLE, "")


class Recorder:
    """Writes a session's settings, metrics and evaluations into one folder.

    A file that cannot be written (a full disk, say) is reported once as a RuntimeWarning and never
    stops training.

    Args:
        folder: where to write; made when first needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._unwritable: set[str] = set()

    def start(self, config: SessionConfig) -> None:
        """Write the session's settings; a second session of a run writes `config-2.yaml`."""
        target, number = self.folder / CONFIG, 1
        while target.exists():
            number += 1
            target = self.folder / f"config-{number}.yaml"
        self._append(target.name, config.to_yaml())

    def step(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one training step's metrics; numbers that are not finite become null."""
        self._append_row(METRICS, {"step": step, **metrics})

    def evaluation(self, report: EvalReport) -> None:
        """Append one evaluation, without its responses."""
        self._append_row(
            EVALUATIONS,
            {
                "dataset": report.dataset,
                "step": report.step,
                "accuracy": report.accuracy,
                "prompts": report.prompts,
                "n_samples_per_prompt": report.n_samples_per_prompt,
                "pass_at_k": {str(k): share for k, share in report.pass_at_k.items()},
                "temperature": report.temperature,
                "left_out": report.left_out,
                "seconds": report.seconds,
            },
        )

    def checkpoint_dir(self, step: int | None = None) -> Path:
        """Where a checkpoint belongs: the run's final one, or that of one step."""
        final = self.folder / CHECKPOINT
        return final if step is None else self.folder / f"{CHECKPOINT}-{step:06d}"

    def _append_row(self, name: str, row: Mapping[str, Any]) -> None:
        self._append(name, json.dumps(_finite(row), default=float, allow_nan=False) + "\n")

    def _append(self, name: str, text: str) -> None:
        """Append in one write, so that a reader never sees half a line of ours."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / name).open("ab", buffering=0) as file:
                file.write(text.encode())
        except OSError as error:
            if name not in self._unwritable:
                self._unwritable.add(name)
                warnings.warn(
                    f"{self.folder / name} cannot be written ({error}). Training goes on; its "
                    f"numbers from here on are missing from that file.",
                    RuntimeWarning,
                    stacklevel=4,
                )


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null instead, at any depth."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (str, bool)) or value is None:
        return value
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
