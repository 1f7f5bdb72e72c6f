"""`Loggers`: passes metrics to the logging process; never blocks on a library, never raises.

Metrics have Miles' names, and are counted by Miles' step keys:

rollout/* and perf/*   over rollout/step, one row a rollout
train/*                over train/step, one row an optimizer step
eval/*                 over eval/step, one row an evaluation
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from kit.config import SessionConfig
from kit.reports import EvalReport, Metrics, UpdateReport
from kit.utils.forks import at_exit

FOLDER = Path("logs")
"""Where an interactive session's folders are made."""
CLOSE_SECONDS = 15.0
"""How long the end of a session waits for what is left to be written and sent."""
WAITING_LINES = 4096
"""More than that are dropped while the other process does not read."""
END_LINE = "null\n"
"""Ends the input of the other process."""
GOES_ON = "Training goes on, and the run's own files are whole."
ROLLOUT_STEP, TRAIN_STEP, EVAL_STEP = "rollout/step", "train/step", "eval/step"
STEP_KEYS = {
    "train/*": TRAIN_STEP,
    "rollout/*": ROLLOUT_STEP,
    "perf/*": ROLLOUT_STEP,
    "eval/*": EVAL_STEP,
}
"""Which step the metrics of each kind are drawn over."""
_WAYS_OUT = {
    "tensorboard": "see that the folder can be written and the disk has room (logging.dir)",
    "wandb": "`wandb login` once, or logging.wandb_mode: offline and `wandb sync` later",
    "trackio": "see that the folder can be written and the disk has room (logging.dir)",
}

Row = tuple[str, Metrics]
"""The step key that a row is counted by, and its metrics, the step among them."""


def start(config: SessionConfig, folder: Path | None) -> Loggers | None:
    """Start the loggers that the settings ask for; None where they ask for none.

    Args:
        config: the session's.
        folder: the run's; None in an interactive session.
    """
    return Loggers(config, folder) if config.logging.used else None


class Loggers:
    """Passes metrics to the process that logs; its methods return at once and never raise.

    Args:
        config: the session's.
        folder: the run's; None makes one in `logs/`.
    """

    def __init__(self, config: SessionConfig, folder: Path | None = None) -> None:
        self._config = config
        name = folder.name if folder else f"{datetime.now():%Y%m%d-%H%M%S}-{config.name}"
        chosen = Path(config.logging.dir) if config.logging.dir else folder
        self.folder = (chosen or FOLDER / name).absolute()
        """Holds what they write."""
        self.open_sinks = set(config.logging.used)
        """Loggers that have neither finished nor failed."""
        self._events: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        self._lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES)
        self.ended = threading.Event()
        self._closed = False
        self._at_exit: Callable[[], None] = self.close
        try:
            self.process = self._launch()
        except OSError as error:
            self.ended.set()
            for sink in sorted(self.open_sinks):
                self._events.put({"sink": sink, "event": "failed", "text": str(error)})
            return
        for job in (self._write, self._read):
            threading.Thread(target=job, name="kit-loggers", daemon=True).start()
        self.put(_order(config, self.folder, name))
        self._at_exit = at_exit(self.close)

    def step(self, metrics: Mapping[str, float], update: UpdateReport, step: int) -> None:
        """Log one training step."""
        self._log(of_step(self._config, metrics, update, step))

    def evaluation(self, report: EvalReport) -> None:
        """Log one evaluation."""
        self._log(of_evaluation(self._config, report))

    def close(self) -> None:
        """Flush what is left. What takes longer than 15 seconds goes on in the background."""
        if self._closed:
            return
        self._closed = True
        atexit.unregister(self._at_exit)
        self.put(None)
        deadline = time.monotonic() + CLOSE_SECONDS
        while not self.ended.wait(0.05) and self.open_sinks and time.monotonic() < deadline:
            self.warn_of_failures()
        self.warn_of_failures()
        for sink in sorted(self.open_sinks):
            self._warn(
                sink,
                f"has not taken everything after {CLOSE_SECONDS:.0f} seconds. It is left alone "
                "with that for two minutes more.",
                "look at your network and at its server",
            )

    # ---- the two pipes -------------------------------------------------------------------------

    def _launch(self) -> subprocess.Popen[str]:
        """Start the process in a session of its own: Jupyter interrupts a kernel's whole group."""
        here = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH", "")]))
        return subprocess.Popen(
            [sys.executable, "-m", "kit.tracking.logger_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
            text=True,
            encoding="utf-8",
        )

    def _write(self) -> None:
        pipe = _open_end(self.process.stdin)
        try:
            while (line := self._lines.get()) is not None:
                pipe.write(line)
                pipe.flush()
            pipe.write(END_LINE)  # a forked child may hold the pipe open for long
            pipe.close()
        except (OSError, ValueError):
            pass  # it has ended, and `_read` sees that

    def _read(self) -> None:
        for line in _open_end(self.process.stdout):
            self._events.put(json.loads(line))
        self.process.wait()
        self.ended.set()

    def put(self, what: object) -> None:
        """Send a row to the process, or None to end its input."""
        with suppress(queue.Full):  # it hangs: told at the end
            self._lines.put_nowait(None if what is None else json.dumps(what) + "\n")

    # ---- what is said of it --------------------------------------------------------------------

    def _log(self, rows: Iterable[Row]) -> None:
        self.warn_of_failures()
        if self.open_sinks and not self._closed:
            for step_key, row in rows:
                self.put([step_key, {name: float(value) for name, value in row.items()}])

    def warn_of_failures(self) -> None:
        """Report what has happened since; verbs call it, so it appears in their cell."""
        gone = self.ended.is_set()
        while not self._events.empty():
            event = self._events.get()
            sink, text = event["sink"], event["text"]
            if event["event"] == "ready":
                if text:
                    print(f"{sink}: {text}")
                continue
            self.open_sinks.discard(sink)
            if event["event"] == "missing":
                self._warn(sink, f"cannot be imported ({text}).", f"pip install {sink}")
            elif event["event"] == "failed":
                self._warn(sink, f"failed ({text}).", _WAYS_OUT[sink])
        if gone and not self._closed:
            for sink in sorted(self.open_sinks):
                self._warn(sink, "ended: its process is gone.", _WAYS_OUT[sink])
            self.open_sinks.clear()

    def _warn(self, sink: str, what: str, fix: str) -> None:
        warnings.warn(
            f"Logging to {sink} {what} {GOES_ON} What to do: {fix}, or set "
            f"logging.use_{sink}: false.",
            RuntimeWarning,
            stacklevel=5,
        )


def _order(config: SessionConfig, folder: Path, name: str) -> dict[str, Any]:
    """Order to the logging process: what to log to, by which settings, and into which folder."""
    return {
        "sinks": list(config.logging.used),
        "settings": config.logging.model_dump(mode="json"),
        "folder": str(folder),
        "name": name,
        "session": config.name,
        "config": config.model_dump(mode="json"),
        "config_yaml": config.to_yaml(),
    }


def _open_end(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None  # both ends were asked for
    return pipe


def of_step(
    config: SessionConfig, metrics: Mapping[str, float], update: UpdateReport, step: int
) -> Iterator[Row]:
    """The rows of one training step.

    Args:
        config: the session's.
        metrics: all of the step's; those of the update and of evaluations are left out here.
        update: brings the rows of its optimizer steps.
        step: the step's number, from 0.
    """
    shared = {n: v for n, v in metrics.items() if not n.startswith(("train/", "eval/"))}
    yield ROLLOUT_STEP, shared | {ROLLOUT_STEP: float(_counted(config, step))}
    first = step * config.training.steps_per_rollout
    for number, row in enumerate(update.per_step):
        yield TRAIN_STEP, row | {TRAIN_STEP: float(first + number)}


def of_evaluation(config: SessionConfig, report: EvalReport) -> Iterator[Row]:
    """The row of one evaluation: mean reward, and pass@k where there are several responses."""
    row = report.metrics | {EVAL_STEP: float(_counted(config, report.step))}
    if report.n_samples_per_prompt > 1:
        row |= {f"eval/{report.dataset}-pass@{k}": share for k, share in report.pass_at_k.items()}
    yield EVAL_STEP, row


def _counted(config: SessionConfig, step: int) -> int:
    by_update = config.logging.wandb_always_use_train_step
    return step * config.training.steps_per_rollout if by_update else step
