"""Metrics for TensorBoard, Weights & Biases and trackio, beside the run's own files.

    the session's process                      a process of its own
    ┌──────────────────────┐  rows, by a pipe  ┌───────────────────────────────┐
    │ Loggers.step         │──────────────────►│ one thread each: TensorBoard, │
    │ Loggers.evaluation   │◄──────────────────│ wandb, trackio                │
    └──────────────────────┘  what went wrong  └───────────────────────────────┘

    settings   `logging` in the configuration; kit/config_logging.py
    rows.py    what is logged at which step, under Miles' names and step keys
    outlet.py  the session's side of the pipe
    process.py the other side
    sinks.py   what is called of the three libraries

The libraries never load in the session's process, so that none of them can hang it, slow it or
bring it down, with no network, a full disk or a broken installation. What went wrong is a
RuntimeWarning, once for each.
"""

from __future__ import annotations

from kit.tracking.loggers import Loggers, start

__all__ = ["Loggers", "start"]
