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

    parameters.py        read a notebook's parameters, and check the values given for them
    overrides.py         how a seed, a preset or other settings reach the notebook's own session
    execute.py           run one notebook, or several that share a stack
    kernel.py            the kernel that a run executes in; kernel_extension.py ends it
    progress.py          the progress bar, read from the run's files
    result.py            headline numbers, machine and figures of a run, for `result.json`
    page.py              `notebook.html`
    resume.py            take a run to its end that was killed, interrupted or failed
    index.py             find runs, read them and list them
    compare.py           runs side by side
    sweep/               a notebook with many values

What a session writes into the folder is in `kit.tracking.recorder`, and what it does in the kernel
of a resumed run in `kit.lifecycle.resume`.
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

_HOMES = {
    "kit.reports.runs": ("RunSettings",),
    "kit.runs.compare": ("compare_runs",),
    "kit.runs.execute": ("RunResult", "run_notebook", "run_notebooks"),
    "kit.runs.parameters": ("Parameter", "read_parameters"),
    "kit.runs.resume": ("resume_notebook",),
    "kit.runs.sweep.run": ("resume_sweep", "run_sweep"),
    "kit.tracking.recorder": ("Recorder", "current_run"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Look a name up when it is first used: a session needs the recorder, not papermill."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kit.runs' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
