"""`show_report`: the display of every report, chosen by its kind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit.memory.plan import MemoryPlan
from kit.reports import (
    CheckReport,
    EvalReport,
    MismatchReport,
    RewardTrial,
    SessionState,
    StepReport,
    SyncReport,
    TrainingStatus,
    TrainReport,
    UpdateReport,
)
from kit.reports.diagnostics import Diagnosis
from kit.reports.runs import RunComparison
from kit.reports.status import Sessions, Snapshot, Snapshots
from kit.reports.what_if import WhatIf
from kit.utils.display import Bundle, Shown, bundle
from kit.viz.html import page, tag
from kit.viz.live.dashboard import dashboard_html, dashboard_plain
from kit.viz.reports.checks import check_html, check_plain, diagnosis_html, diagnosis_plain
from kit.viz.reports.evaluation import eval_html, eval_plain
from kit.viz.reports.memory import memory_html, memory_plain
from kit.viz.reports.mismatch import mismatch_html, mismatch_plain
from kit.viz.reports.reward_trial import trial_html, trial_plain
from kit.viz.reports.runs import comparison_html, comparison_plain
from kit.viz.reports.session import (
    session_html,
    session_plain,
    sessions_html,
    sessions_plain,
    snapshot_line,
    snapshot_line_html,
    snapshots_html,
    snapshots_plain,
)
from kit.viz.reports.training import step_html, step_plain, train_html, train_plain
from kit.viz.reports.update import sync_line, update_html, update_plain
from kit.viz.reports.what_if import what_if_html, what_if_plain

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
