"""`Recorder`: writes metrics, samples and evaluations of a session into a run's folder.

The files are plain JSON lines, so that a run can be followed with `tail -f` and read by anything.
Where an undo takes steps back (`session.restore`), their lines leave `metrics.jsonl` and
`samples.jsonl`, so that both tell one story from the first step to the last; the metrics go to
`undone.jsonl`. What was evaluated meanwhile stays in `evaluations.jsonl`: it was measured.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.config import SessionConfig
from kit.config.presets import PRESETS
from kit.reports import EvalReport
from kit.reports.runs import RunSettings
from kit.samples import Rollout
from kit.tracking.run_folder import (
    ATTEMPTS,
    CHANGES,
    CHECKPOINTS,
    CONFIG,
    EVALUATIONS,
    FINAL,
    FORKS,
    INPUTS,
    METRICS,
    SAMPLES,
    UNDONE,
)
from kit.utils.files import replacing_file

RUN_DIR_VARIABLE = "KIT_RUN_DIR"
"""Names the run's folder to the notebook's kernel; `kit run` sets it."""
GROUP_VARIABLE = "KIT_RUN_GROUP"
"""Names runs that follow each other and share a stack; `kit run` sets it."""
NAME_VARIABLE = "KIT_RUN_NAME"
"""Names the folder of the run that a `kit run` starts; a sweep sets it, to know its members'."""

LINES = (METRICS, EVALUATIONS, SAMPLES, UNDONE, CHANGES, INPUTS)

_sessions = itertools.count(1)


def current_run() -> Recorder | None:
    """The recorder of the run that this process belongs to; None in an interactive notebook."""
    folder = os.environ.get(RUN_DIR_VARIABLE)
    return Recorder(folder) if folder else None


def current_group() -> str:
    """The group of runs that this process belongs to; empty where it belongs to none."""
    return os.environ.get(GROUP_VARIABLE, "")


def is_mark(mark: Any) -> bool:
    """Whether something read from a file is what `Recorder.mark` returned.

    Files are replaced and removed by its names, so it has those of a run's files and no others.
    """

    def counts(numbers: Iterable[Any]) -> bool:
        return all(type(number) is int and number >= 0 for number in numbers)

    if not isinstance(mark, dict) or not isinstance(mark.get("sizes"), dict):
        return False
    rows = mark.get("rows")
    if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) == 2 for r in rows):
        return False
    return (
        mark["sizes"].keys() <= set(LINES)
        and counts(mark["sizes"].values())
        and counts((mark.get("attempt"), mark.get("base")))
        and all(map(counts, rows))
    )


@dataclass(frozen=True, slots=True)
class TrainingKey:
    """A training of a run, by what is the same in every attempt at the run."""

    session: int
    """Which session of the notebook, counted from 1."""
    training: int
    """Which of the session's calls of `train`, counted from 1."""
    begin: int
    """The session's step at its begin."""


class Recorder:
    """Writes a session's settings, metrics, samples and evaluations into one folder.

    A file that cannot be written (a full disk, say) is reported once as a RuntimeWarning and never
    stops training.

    Args:
        folder: where to write; made when first needed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.settings = RunSettings.here()
        self.session = 0
        """Which session of the notebook writes, counted from 1."""
        self.trainings = 0
        """How many calls of `train` the session has had."""
        self.training: TrainingKey | None = None
        """The training under way."""
        self._base: int | None = None
        """Steps that the session had behind it when it wrote its first line."""
        self._rows: list[tuple[int, int]] = []
        """For each step: where its line begins in `metrics.jsonl`, and in `samples.jsonl`."""
        self._unwritable: set[str] = set()

    def of_fork(self, name: str) -> Recorder:
        """A recorder for a fork of the session, in a folder below this one."""
        return Recorder(self.folder / FORKS / name)

    def start(self, config: SessionConfig, inputs: Mapping[str, Any] | None = None) -> None:
        """Write the session's settings; a second session of a run writes `config-2.yaml`.

        Args:
            config: the settings.
            inputs: functions and data that it was started with, by argument; see `Inputs`.
        """
        self.session = next(_sessions)
        target, number = self.folder / CONFIG, 1
        while target.exists():
            number += 1
            target = self.folder / f"config-{number}.yaml"
        self._append(target.name, config.to_yaml())
        for name, told in (inputs or {}).items():
            self._append_row(INPUTS, {"session": self.session, "argument": name, "value": told})

    def step(
        self,
        metrics: Mapping[str, float],
        step: int,
        rollout: Rollout | None = None,
        history: int | None = None,
    ) -> None:
        """Append one training step's metrics; numbers that are not finite become null.

        Args:
            metrics: under their names.
            step: its number.
            rollout: what it was trained on; kept where it is the step's turn.
            history: steps that the session has behind it, this one included. Lines of others, which
                were undone, are taken out first.
        """
        if history is not None:
            self.truncate_to(history - 1)
            self._rows.append((_size(self.folder / METRICS), _size(self.folder / SAMPLES)))
        self._append_row(METRICS, {"step": step, **metrics})
        every = self.settings.samples_every
        if rollout is not None and every and step % every == 0:
            self._samples(rollout, step)

    def _samples(self, rollout: Rollout, step: int) -> None:
        try:
            rows = [_finite({"step": step, **sample.to_dict()}) for sample in rollout]
            lines = [json.dumps(row, allow_nan=False) + "\n" for row in rows]
        except (TypeError, ValueError) as error:
            self._warn(SAMPLES, f"metadata that is not plain data: {error}")
            return
        self._append(SAMPLES, "".join(lines))

    def truncate_to(self, history: int) -> None:
        """Remove the lines of undone steps.

        Args:
            history: number of steps that the session has done, undone ones not counted.
        """
        if self._base is None or history < self._base:
            self._base = history if not self._rows else min(self._base or 0, history)
        kept = history - self._base
        if kept >= len(self._rows):
            return
        metrics, samples = self._rows[kept]
        del self._rows[kept:]
        try:
            with (self.folder / METRICS).open("r+b") as file:
                file.seek(metrics)
                undone = file.read()
                self._append(UNDONE, undone.decode())
                file.truncate(metrics)
            if (self.folder / SAMPLES).is_file():
                os.truncate(self.folder / SAMPLES, samples)
        except OSError as error:
            self._warn(METRICS, str(error))

    def evaluation(self, report: EvalReport) -> None:
        """Append one evaluation, without its responses."""
        self._append_row(
            EVALUATIONS,
            {
                "dataset": report.dataset,
                "step": report.step,
                "mean_reward": report.mean_reward,
                "accuracy": report.accuracy,
                "prompts": report.prompts,
                "n_samples_per_prompt": report.n_samples_per_prompt,
                "pass_at_k": {str(k): share for k, share in report.pass_at_k.items()},
                "temperature": report.temperature,
                "left_out": report.left_out,
                "seconds": report.seconds,
            },
        )

    def changes(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append settings that were changed while the session ran."""
        for row in rows:
            self._append_row(CHANGES, row)

    def checkpoint_dir(self, step: int | None = None) -> Path:
        """The folder of a checkpoint: the run's final one, or that of one step."""
        return self.folder / CHECKPOINTS / (FINAL if step is None else f"step-{step:06d}")

    # ---- what a resumed run goes on from -------------------------------------------------------

    def mark(self) -> dict[str, Any]:
        """Current ends of the files, for a checkpoint to remember."""
        return {
            "attempt": self.settings.attempt,
            "sizes": {name: _size(self.folder / name) for name in LINES},
            "base": self._base or 0,
            "rows": self._rows,
        }

    def holds(self, mark: Mapping[str, Any]) -> bool:
        """Whether the files that a mark refers to still exist."""
        before = self._before(int(mark["attempt"]))
        sizes = mark["sizes"].items()
        return all(not size or _size(before / name) >= size for name, size in sizes)

    def restore(self, mark: Mapping[str, Any]) -> None:
        """Restore the files to the state at which the mark was made."""
        before = self._before(int(mark["attempt"]))
        for name, size in mark["sizes"].items():
            target = self.folder / name
            if size:
                with replacing_file(target) as partial:
                    shutil.copyfile(before / name, partial)
                    os.truncate(partial, size)
            else:
                target.unlink(missing_ok=True)
        self._base = int(mark["base"])
        self._rows = [(int(metrics), int(samples)) for metrics, samples in mark["rows"]]

    def _before(self, attempt: int) -> Path:
        """Folder with the files of an earlier attempt."""
        root = Path(self.settings.folder or self.folder)
        with suppress(ValueError):
            return root / ATTEMPTS / str(attempt) / self.folder.resolve().relative_to(root)
        return root / ATTEMPTS / str(attempt)

    # ---- writing -------------------------------------------------------------------------------

    def _append_row(self, name: str, row: Mapping[str, Any]) -> None:
        self._append(name, json.dumps(_finite(row), allow_nan=False) + "\n")

    def _append(self, name: str, text: str) -> None:
        """Append in one write, so that no reader ever sees half a line."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / name).open("ab", buffering=0) as file:
                file.write(text.encode())
        except OSError as error:
            self._warn(name, str(error))

    def _warn(self, name: str, why: str) -> None:
        if name in self._unwritable:
            return
        self._unwritable.add(name)
        warnings.warn(
            f"{self.folder / name} cannot be written ({why}). Training goes on; what belongs there "
            f"from here on is missing from that file.",
            RuntimeWarning,
            stacklevel=5,
        )


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _finite(value: Any) -> Any:
    """Convert to JSON's types, at any depth: NaN and infinity to null, arrays to lists."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, (str, int)) or value is None:
        return value
    if hasattr(value, "tolist"):
        return _finite(value.tolist())
    number = float(value)
    return number if math.isfinite(number) else None


def apply_run_settings(config: SessionConfig | str | Path) -> SessionConfig | str | Path:
    """Configuration of a session that a run's notebook starts with `config`."""
    settings = RunSettings.here()
    if settings.preset and isinstance(config, str) and config in PRESETS:
        config = settings.preset
    if settings.seed is not None:
        config = SessionConfig.of(config).replace("seed", settings.seed)
    return config
