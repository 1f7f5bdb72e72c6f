"""RL post-training of language models on one device, from a notebook.

from kit import RLSession

session = RLSession.start("tiny")
session.train(20)

`RLSession` holds the verbs, `SessionConfig` the settings, `Sample` and `Rollout` what the model
wrote. Importing this package loads none of the stack (no torch, SGLang, Ray): each name below is
looked up when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from kit.utils.forks import end_with_cell
from kit.utils.shadowing import explain_failed_import
from kit.utils.tracebacks import install
from kit.utils.versions import installed_version

if TYPE_CHECKING:
    from kit.checkpoint.quantize import quantization_report
    from kit.compare import compare
    from kit.config import SessionConfig
    from kit.drafts import DraftReport, make_draft
    from kit.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        KitError,
        ModelError,
        RewardError,
        RunError,
        SessionError,
        StackError,
    )
    from kit.lifecycle.train_loop import Training
    from kit.memory import MemoryPlan
    from kit.memory.plan import memory_plan
    from kit.reports import (
        CheckReport,
        EvalReport,
        MismatchReport,
        RewardTrial,
        StepReport,
        SyncReport,
        TrainingStatus,
        TrainReport,
        UpdateReport,
    )
    from kit.reports.diagnostics import Diagnosis
    from kit.reports.quantization import QuantizationReport
    from kit.reports.status import Snapshot
    from kit.reports.what_if import WhatIf
    from kit.samples import Batch, Rollout, Sample, Status
    from kit.session import RLSession


__all__ = [
    "Batch",
    "CheckReport",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Diagnosis",
    "DraftReport",
    "EvalReport",
    "KitError",
    "MemoryPlan",
    "MismatchReport",
    "ModelError",
    "QuantizationReport",
    "RLSession",
    "RewardError",
    "RewardTrial",
    "Rollout",
    "RunError",
    "Sample",
    "SessionConfig",
    "SessionError",
    "Snapshot",
    "StackError",
    "Status",
    "StepReport",
    "SyncReport",
    "TrainReport",
    "Training",
    "TrainingStatus",
    "UpdateReport",
    "WhatIf",
    "__version__",
    "compare",
    "make_draft",
    "memory_plan",
    "quantization_report",
]
__version__ = installed_version("kit") or "0+unknown"  # a checkout on PYTHONPATH, not installed
_HOMES = {
    "kit.checkpoint.quantize": ("quantization_report",),
    "kit.compare": ("compare",),
    "kit.config": ("SessionConfig",),
    "kit.drafts": ("DraftReport", "make_draft"),
    "kit.reports.diagnostics": ("Diagnosis",),
    "kit.reports.quantization": ("QuantizationReport",),
    "kit.memory.plan": ("MemoryPlan", "memory_plan"),
    "kit.reports": ("RewardTrial", "TrainingStatus"),
    "kit.samples": ("Batch", "Rollout", "Sample", "Status"),
    "kit.session": ("RLSession",),
    "kit.reports.status": ("Snapshot",),
    "kit.lifecycle.train_loop": ("Training",),
    "kit.reports.what_if": ("WhatIf",),
}
_HOME_OF = {name: "kit.errors" for name in __all__ if name.endswith("Error")}
_HOME_OF |= {name: "kit.reports" for name in __all__ if name.endswith("Report")}
_HOME_OF |= {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'kit' has no attribute {name!r}")
    try:
        value = getattr(import_module(_HOME_OF[name]), name)
    except (ImportError, AttributeError) as error:
        if explained := explain_failed_import(error):  # it was the user's `pydantic.py`
            raise explained from error
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


install()
end_with_cell()
