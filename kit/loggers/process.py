"""The process that logs: `python -m kit.loggers.process`, with lines of JSON on its pipes.

In: first an order (what to log to, settings, folder), then a row a line, `[step key, metrics]`; the
end of the input is the end of the run. Out: `{"sink": ..., "ready" | "failed" | "finished": ...}`.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
from typing import Any, TextIO

LAST_SECONDS = 120.0
"""After the end of its input it sends what is left for so long."""
WAITING_ROWS = 20_000
"""More than that are dropped while a library hangs."""

Rows = queue.Queue[tuple[str, dict[str, float]] | None]


def main() -> None:
    """Log until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    told = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what the libraries print is not for whoever reads the cell
    os.dup2(nowhere, 2)
    order = json.loads(sys.stdin.readline() or "null")
    if not order:
        return
    queues: dict[str, Rows] = {name: queue.Queue(WAITING_ROWS) for name in order["sinks"]}
    threads = [
        threading.Thread(target=_serve, args=(name, order, rows, told), daemon=True)
        for name, rows in queues.items()
    ]
    for thread in threads:
        thread.start()
    for line in sys.stdin:
        step_key, row = json.loads(line)
        for rows in queues.values():
            if not rows.full():
                rows.put((step_key, row))
    for rows in queues.values():
        rows.put(None) if not rows.full() else None
    for thread in threads:
        thread.join(LAST_SECONDS / len(threads))
    os._exit(0)  # whatever a library still waits for


def _serve(name: str, order: dict[str, Any], rows: Rows, told: TextIO) -> None:
    from kit.loggers.sinks import SINKS

    try:
        sink = SINKS[name](order)
        _tell(told, name, "ready", sink.where)
        while row := rows.get():
            sink.log(*row)
        sink.finish()
        _tell(told, name, "finished", "")
    except ImportError as error:
        _tell(told, name, "missing", str(error))
    except BaseException as error:  # a library may call sys.exit
        _tell(told, name, "failed", f"{type(error).__name__}: {error}")


_one_at_a_time = threading.Lock()


def _tell(told: TextIO, name: str, event: str, text: str) -> None:
    try:
        with _one_at_a_time:
            told.write(json.dumps({"sink": name, "event": event, "text": text}) + "\n")
            told.flush()
    except OSError:
        pass  # nobody listens any more


if __name__ == "__main__":
    main()
