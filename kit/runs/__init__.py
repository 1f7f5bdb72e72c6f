"""Batch runs: a notebook executed by papermill into a folder of its own.

    papermill_runs/20260131-142501-02_train_to_solve-3fa9c1/
      notebook.ipynb       the notebook as it ran, outputs included; a failing cell is marked
      notebook.html        the same, to look at without Jupyter and without a network
      params.yaml          all parameters, as they were
      config.yaml          every setting of the session
      metrics.jsonl        one line a training step; but for perf/*, the same seed gives the same
      evaluations.jsonl    one line an evaluation
      samples.jsonl        one line a sample, of every tenth step (`--samples-every`)
      undone.jsonl         lines of metrics.jsonl whose steps `session.restore` has undone
      result.json          how it ended: status, headline numbers, parameters, versions, commit
      figures/             reward_curve.png, the picture of metrics.jsonl
      checkpoints/         step-000012/, saved while training; final/, what `session.save()` wrote
      attempts/            of a run that is being resumed: what the attempts before have written

`parameters` reads and checks a notebook's parameters, `settings` is what else a run can be told and
`asked` how a seed or a preset reaches the notebook. `launch` runs it, `several` runs some that
share a stack, `resume` takes one to its end that was killed, and `continuing` is what that does in
its kernel. `kernel` and `progress` are what it runs with, `record` is what a session writes,
`result` its `result.json`; `outcome` and `page` are made of that.

`sweep` runs a notebook with many values: what to run is in `sweep_plan`, where in `sweep_places`,
one member in `sweep_member`, when to stop it in `sweep_stopping`, how far it came in `sweep_state`.
`listing` finds runs and reads them, `compare` lays them side by side.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kit.reports.runs import RunSettings
    from kit.runs.compare import compare_runs
    from kit.runs.execute import RunResult, run_notebook, run_notebooks
    from kit.runs.parameters import Parameter, read_parameters
    from kit.runs.resume import resume_notebook
    from kit.runs.sweep.run import resume_sweep, run_sweep
    from kit.tracking.recorder import Recorder, current_run


__all__ = [
    "Parameter",
    "Recorder",
    "RunResult",
    "RunSettings",
    "compare_runs",
    "current_run",
    "read_parameters",
    "resume_notebook",
    "resume_sweep",
    "run_notebook",
    "run_notebooks",
    "run_sweep",
]


_HOME_OF = {
    "Parameter": "kit.runs.parameters",
    "Recorder": "kit.tracking.recorder",
    "RunResult": "kit.runs.execute",
    "RunSettings": "kit.reports.runs",
    "compare_runs": "kit.runs.compare",
    "current_run": "kit.tracking.recorder",
    "read_parameters": "kit.runs.parameters",
    "resume_notebook": "kit.runs.resume",
    "resume_sweep": "kit.runs.sweep.run",
    "run_notebook": "kit.runs.execute",
    "run_notebooks": "kit.runs.execute",
    "run_sweep": "kit.runs.sweep.run",
}


def __getattr__(name: str) -> object:
    """Look a name up when it is first used: a session needs the recorder, not papermill."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kit.runs' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
