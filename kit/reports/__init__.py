"""What the verbs return: frozen results, each of which shows itself in a notebook.

training.py      UpdateReport, SyncReport, StepReport, TrainReport, EvalReport
diagnostics.py   MismatchReport, CheckReport, RewardTrial, Diagnosis
quantization.py  QuantizationReport: what quantising does to weights
what_if.py       WhatIf: the same update under other settings
status.py        SessionState, TrainingStatus, Snapshots, Sessions
runs.py          result.json of a run (RunRecord), RunComparison
"""

from __future__ import annotations

from kit.reports.diagnostics import (
    Cause,
    CheckReport,
    CurvePoint,
    Invariant,
    MismatchReport,
    RewardDifference,
    RewardFailure,
    RewardTrial,
    Scoring,
    TokenDifference,
    Verdict,
)
from kit.reports.status import SessionState, TrainingState, TrainingStatus
from kit.reports.training import (
    REWARD,
    STEP,
    EvalReport,
    Metrics,
    StepReport,
    SyncReport,
    TrainReport,
    UpdateReport,
)

__all__ = [
    "REWARD",
    "STEP",
    "Cause",
    "CheckReport",
    "CurvePoint",
    "EvalReport",
    "Invariant",
    "Metrics",
    "MismatchReport",
    "RewardDifference",
    "RewardFailure",
    "RewardTrial",
    "Scoring",
    "SessionState",
    "StepReport",
    "SyncReport",
    "TokenDifference",
    "TrainReport",
    "TrainingState",
    "TrainingStatus",
    "UpdateReport",
    "Verdict",
]
