"""`show_report`: the display of every report, chosen by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit.attaching import Sessions
from kit.doctor.findings import Diagnosis
from kit.memory.plan import MemoryPlan
from kit.reports import (
    CheckReport,
    EvalReport,
    MismatchReport,
    RewardTrial,
    SessionState,
    Shown,
    StepReport,
    SyncReport,
    TrainingStatus,
    TrainReport,
    UpdateReport,
)
from kit.runs.compare import RunComparison
from kit.snapshots import Snapshot, Snapshots
from kit.viz.checks import eval_html, eval_plain
from kit.viz.compared_runs import comparison_html, comparison_plain
from kit.viz.dashboard import dashboard_html, dashboard_plain
from kit.viz.diagnosis import diagnosis_html, diagnosis_plain
from kit.viz.health import check_html, check_plain
from kit.viz.html import Bundle, bundle, page, tag
from kit.viz.living import sessions_html, sessions_plain
from kit.viz.memory import memory_html, memory_plain
from kit.viz.mismatch import mismatch_html, mismatch_plain
from kit.viz.sessions import session_html, session_plain
from kit.viz.snapshots import (
    snapshot_line,
    snapshot_line_html,
    snapshots_html,
    snapshots_plain,
)
from kit.viz.training import step_html, step_plain, train_html, train_plain
from kit.viz.trials import trial_html, trial_plain
from kit.viz.updates import sync_line, update_html, update_plain
from kit.viz.what_if import what_if_html, what_if_plain
from kit.what_if import WhatIf

_DISPLAYS: dict[type[Shown], tuple[Callable[[Any], str], Callable[[Any], str]]] = {
    UpdateReport: (update_html, update_plain),
    SyncReport: (lambda report: tag("div", f"✓ {sync_line(report)}"), sync_line),
    CheckReport: (check_html, check_plain),
    MismatchReport: (mismatch_html, mismatch_plain),
    EvalReport: (eval_html, eval_plain),
    StepReport: (step_html, step_plain),
    TrainReport: (train_html, train_plain),
    SessionState: (session_html, session_plain),
    Sessions: (sessions_html, sessions_plain),
    RewardTrial: (trial_html, trial_plain),
    TrainingStatus: (dashboard_html, dashboard_plain),
    Diagnosis: (diagnosis_html, diagnosis_plain),
    MemoryPlan: (memory_html, memory_plain),
    WhatIf: (what_if_html, what_if_plain),
    Snapshot: (snapshot_line_html, snapshot_line),
    Snapshots: (snapshots_html, snapshots_plain),
    RunComparison: (comparison_html, comparison_plain),
}


def show_report(report: Shown) -> Bundle:
    """HTML and plain text of a report. Raises TypeError for a kind that has no display."""
    for kind, (html, plain) in _DISPLAYS.items():
        if isinstance(report, kind):
            return bundle(page(html(report)), plain(report))
    raise TypeError(f"There is no display for {type(report).__name__}.")
