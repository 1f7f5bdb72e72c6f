"""Metrics: what they mean, the files of a run, and TensorBoard, Weights & Biases and trackio.

    the session's process                      a process of its own
    ┌──────────────────────┐  rows, by a pipe  ┌───────────────────────────────┐
    │ Loggers.step         │──────────────────►│ one thread each: TensorBoard, │
    │ Loggers.evaluation   │◄──────────────────│ wandb, trackio                │
    └──────────────────────┘  what went wrong  └───────────────────────────────┘

    catalog.py         what each metric means, and which values are healthy
    metrics.py         the metrics of a training step
    trends.py          what the course of a run shows, and no single step does
    recorder.py        what a session writes into the folder of its run
    run_folder.py      the names of a run's folder and files, and how to find it by a name
    run_files.py       what those files say, and what in them cannot be read
    loggers.py         the session's side of the pipe: what is logged at which step
    logger_process.py  the other side: what is called of the three libraries

The libraries never load in the session's process, so that none of them can hang it, slow it or
bring it down, with no network, a full disk or a broken installation. What went wrong is a
RuntimeWarning, once for each.
"""

from __future__ import annotations

from kit.tracking.loggers import Loggers, start

__all__ = ["Loggers", "start"]
