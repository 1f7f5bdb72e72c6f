"""The results of the verbs as pictures, and settings, sessions and runs: one module a kind."""

from kit.viz.reports import (
    checks,
    evaluation,
    memory,
    mismatch,
    quantization,
    reward_trial,
    runs,
    session,
    settings,
    training,
    update,
    what_if,
)

__all__ = [
    "checks",
    "evaluation",
    "memory",
    "mismatch",
    "quantization",
    "reward_trial",
    "runs",
    "session",
    "settings",
    "training",
    "update",
    "what_if",
]
