"""The process that logs, `python -m kit.tracking.logger_process`, with lines of JSON on its pipes.

In: first an order (what to log to, settings, folder), then a row a line, `[step key, metrics]`; the
end of the input is the end of the run. Out: `{"sink": ..., "event": ..., "text": ...}`, where the
event is `ready`, `missing`, `failed` or `finished`.

Each of TensorBoard, Weights & Biases and trackio is called in a thread of its own.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, TextIO

from kit.tracking.loggers import STEP_KEYS

LAST_SECONDS = 120.0
"""After the end of its input it sends what is left for so long."""
WAITING_ROWS = 20_000
"""More than that are dropped while a library hangs."""

Rows = queue.Queue[tuple[str, dict[str, float]] | None]


def main() -> None:
    """Log until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events_out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what the libraries print is not for whoever reads the cell
    os.dup2(nowhere, 2)
    order = json.loads(sys.stdin.readline() or "null")
    if not order:
        return
    queues: dict[str, Rows] = {name: queue.Queue(WAITING_ROWS) for name in order["sinks"]}
    threads = [
        threading.Thread(target=_serve, args=(name, order, rows, events_out), daemon=True)
        for name, rows in queues.items()
    ]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        if (told := json.loads(line)) is None:
            break
        step_key, row = told
        for rows in queues.values():
            with suppress(queue.Full):
                rows.put_nowait((step_key, row))
    for rows in queues.values():
        with suppress(queue.Full):
            rows.put_nowait(None)
    for thread in threads:
        thread.join(LAST_SECONDS / len(threads))
    os._exit(0)  # whatever a library still waits for


def _serve(name: str, order: dict[str, Any], rows: Rows, events_out: TextIO) -> None:
    try:
        sink = SINKS[name](order)
        _tell(events_out, name, "ready", sink.where)
        while row := rows.get():
            sink.log(*row)
        sink.finish()
        _tell(events_out, name, "finished", "")
    except ImportError as error:
        _tell(events_out, name, "missing", str(error))
    except BaseException as error:  # a library may call sys.exit
        _tell(events_out, name, "failed", f"{type(error).__name__}: {error}")


_one_at_a_time = threading.Lock()


def _tell(events_out: TextIO, name: str, event: str, text: str) -> None:
    with suppress(OSError), _one_at_a_time:  # the session's process may have ended
        events_out.write(json.dumps({"sink": name, "event": event, "text": text}) + "\n")
        events_out.flush()


class Sink(Protocol):
    """Destination of metrics. Every method may raise, and may block for ever."""

    def __init__(self, order: dict[str, Any]) -> None: ...

    where: str
    """What to call or open to look at it; empty where a look at its files is all there is."""

    def log(self, step_key: str, row: dict[str, float]) -> None:
        """Log one row, which has its own step under `step_key`."""

    def finish(self) -> None:
        """Write and send what is left."""


class TensorBoard:
    """Event files in `tensorboard/`."""

    def __init__(self, order: dict[str, Any]) -> None:
        from tensorboard.summary import Writer

        settings = order["settings"]
        folder = Path(order["folder"], "tensorboard")
        folder = folder / settings["tb_project_name"] / settings["tb_experiment_name"]
        folder.mkdir(parents=True, exist_ok=True)
        _write_text(folder, {"config": order["config_yaml"], "folder": order["folder"]})
        self._writer = Writer(str(folder))
        self.where = ""

    def log(self, step_key: str, row: dict[str, float]) -> None:
        """Write a scalar for each metric."""
        for name, value in row.items():
            self._writer.add_scalar(name, value, int(row[step_key]))
        self._writer.flush()  # to be seen while training goes on

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, its files in `wandb/`."""

    def __init__(self, order: dict[str, Any]) -> None:
        import wandb

        settings = order["settings"]
        if settings["wandb_host"]:
            os.environ["WANDB_BASE_URL"] = settings["wandb_host"]
        Path(order["folder"]).mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            entity=settings["wandb_team"] or None,
            project=settings["wandb_project"],
            group=settings["wandb_group"] or order["session"],
            name=order["name"],
            id=settings["wandb_run_id"] or None,
            resume="allow" if settings["wandb_run_id"] else None,
            dir=order["folder"],
            mode=settings["wandb_mode"],
            config=order["config"] | {"run_folder": order["folder"]},
            settings=wandb.Settings(console="off", silent=True),
        )
        for key in sorted(set(STEP_KEYS.values())):
            self._run.define_metric(key)
        for pattern, key in STEP_KEYS.items():
            self._run.define_metric(pattern, step_metric=key)
        self.where = self._run.url or ""

    def log(self, step_key: str, row: dict[str, float]) -> None:
        """Log one row of the run's history."""
        self._run.log(row)

    def finish(self) -> None:
        """Send what is left."""
        self._run.finish()


class Trackio:
    """A run of trackio, in a database in `trackio/`, or on the server that the settings name."""

    def __init__(self, order: dict[str, Any]) -> None:
        settings = order["settings"]
        # Trackio reads it when it is imported.
        os.environ.setdefault("TRACKIO_DIR", str(Path(order["folder"], "trackio")))
        import trackio

        Path(os.environ["TRACKIO_DIR"]).mkdir(parents=True, exist_ok=True)
        project = settings["trackio_project"] or settings["wandb_project"]
        group = settings["trackio_group"] or settings["wandb_group"] or order["session"]
        self._run = trackio.init(
            project=project,
            name=settings["trackio_run_name"] or order["name"],
            group=group,
            space_id=settings["trackio_space_id"] or None,
            server_url=settings["trackio_server_url"] or None,
            config=order["config"] | {"run_folder": order["folder"]},
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        self.where = ""

    def log(self, step_key: str, row: dict[str, float]) -> None:
        """Log one row of the run's history; trackio lets any of its columns be the x axis."""
        self._run.log(row)

    def finish(self) -> None:
        """Write what is left."""
        self._run.finish()


SINKS: dict[str, type[Sink]] = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio}
"""Each by its name in the settings (`use_...`), which is that of its package too."""


def _write_text(folder: Path, texts: dict[str, str]) -> None:
    """Write the texts that TensorBoard shows under TEXT."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.metadata import create_summary_metadata
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
    from tensorboard.util.tensor_util import make_tensor_proto

    writer = EventFileWriter(str(folder), filename_suffix=".text")
    for name, text in texts.items():
        block = "".join(f"    {line}\n" for line in text.splitlines())  # as code, not Markdown
        value = Summary.Value(
            tag=name,
            metadata=create_summary_metadata("", ""),
            tensor=make_tensor_proto([block.encode()]),
        )
        writer.add_event(Event(summary=Summary(value=[value]), step=0))
    writer.close()


if __name__ == "__main__":
    main()
