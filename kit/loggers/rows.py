"""What is logged at which step: metrics under Miles' names, counted by Miles' step keys.

rollout/* and perf/*   over rollout/step, one row a rollout
train/*                over train/step, one row an optimizer step
eval/*                 over eval/step, one row an evaluation
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from kit.config import SessionConfig
from kit.reports import EvalReport, Metrics, UpdateReport

ROLLOUT_STEP, TRAIN_STEP, EVAL_STEP = "rollout/step", "train/step", "eval/step"
STEP_KEYS = {
    "train/*": TRAIN_STEP,
    "rollout/*": ROLLOUT_STEP,
    "perf/*": ROLLOUT_STEP,
    "eval/*": EVAL_STEP,
}
"""Which step the metrics of each kind are drawn over."""

Row = tuple[str, Metrics]
"""The step key that a row is counted by, and its metrics, the step among them."""


def of_step(
    config: SessionConfig, metrics: Mapping[str, float], update: UpdateReport, step: int
) -> Iterator[Row]:
    """The rows of one training step.

    Args:
        config: the session's.
        metrics: all of the step's; those of the update and of evaluations are left out here.
        update: brings the rows of its optimizer steps.
        step: the step's number, from 0.
    """
    shared = {n: v for n, v in metrics.items() if not n.startswith(("train/", "eval/"))}
    yield ROLLOUT_STEP, shared | {ROLLOUT_STEP: float(_counted(config, step))}
    first = step * config.training.steps_per_rollout
    for number, row in enumerate(update.per_step):
        yield TRAIN_STEP, row | {TRAIN_STEP: float(first + number)}


def of_evaluation(config: SessionConfig, report: EvalReport) -> Iterator[Row]:
    """The row of one evaluation: accuracy, and pass@k where there are several responses."""
    row = report.metrics | {EVAL_STEP: float(_counted(config, report.step))}
    if report.n_samples_per_prompt > 1:
        row |= {f"eval/{report.dataset}-pass@{k}": share for k, share in report.pass_at_k.items()}
    yield EVAL_STEP, row


def _counted(config: SessionConfig, step: int) -> int:
    by_update = config.logging.wandb_always_use_train_step
    return step * config.training.steps_per_rollout if by_update else step
