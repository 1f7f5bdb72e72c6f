"""Batch runs: a notebook executed by papermill into a folder of its own.

    papermill_runs/20260131-142501-02_train_to_solve/
      notebook.ipynb       the notebook as it ran, outputs included; a failing cell is marked
      notebook.html        the same, to look at without Jupyter and without a network
      config.yaml          every setting of the session
      metrics.jsonl        one line a training step
      evaluations.jsonl    one line an evaluation
      result.json          how it ended: status, headline numbers, parameters, versions, commit
      reward_curve.png     the picture of metrics.jsonl
      checkpoint/          what `session.save()` wrote

`parameters` reads and checks a notebook's parameters, `launch` runs it, `several` runs some that
share a stack, `kernel` and `progress` are what it runs with, `record` is what a session writes,
`outcome` and `page` are made of that.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kit.runs.launch import RunResult, run_notebook
    from kit.runs.parameters import Parameter, read_parameters
    from kit.runs.record import Recorder, current_run
    from kit.runs.several import run_notebooks

__all__ = [
    "Parameter",
    "Recorder",
    "RunResult",
    "current_run",
    "read_parameters",
    "run_notebook",
    "run_notebooks",
]

_HOME_OF = {
    "Parameter": "kit.runs.parameters",
    "Recorder": "kit.runs.record",
    "RunResult": "kit.runs.launch",
    "current_run": "kit.runs.record",
    "read_parameters": "kit.runs.parameters",
    "run_notebook": "kit.runs.launch",
    "run_notebooks": "kit.runs.several",
}


def __getattr__(name: str) -> object:
    """Look a name up when it is first used: a session needs the recorder, not papermill."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kit.runs' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
