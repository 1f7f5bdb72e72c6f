"""`kit.compare`: results of the same kind, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from kit.errors import DataError
from kit.samples import Batch, Rollout
from kit.utils.display import Picture

if TYPE_CHECKING:
    from kit.reports.runs import RunComparison


@overload
def compare(
    *results: str | Path, n: int = 8, metrics: Sequence[str] | None = None
) -> RunComparison: ...


@overload
def compare(*results: Rollout | Batch, n: int = 8) -> Picture: ...


def compare(
    *results: Any, n: int = 8, metrics: Sequence[str] | None = None
) -> Picture | RunComparison:
    """Lay results of the same kind side by side.

    Runs, by their folders or names, as `kit compare` takes them: curves (those that differ only in
    their seed are one, with a band), what differs in parameters, settings and versions, and what
    they wrote to the same prompts. A sweep stands for all its members:

        kit.compare("last", "last~1")
        kit.compare("papermill_runs/20260131-142501-sweep-02_train_to_solve-1f0c2a")

    Two rollouts or batches: the same prompts before and after. Where they were annotated with the
    weights before and after an update, also which tokens gained and which lost probability:

        before = session.annotate(rollout)
        session.update(session.advantages(rollout))
        after = session.annotate(before)
        kit.compare(before, after)

    Args:
        results: runs, or two rollouts, or two batches.
        n: how many prompts are shown.
        metrics: of runs: what to draw beside the reward; None takes the usual ones.

    Raises:
        DataError: there is no way to compare these.
        RunError: there is no such run, or no such metric.
    """
    if results and all(isinstance(result, (str, Path)) for result in results):
        from kit.runs.compare import compare_runs

        return compare_runs(results, metrics=metrics, n=n)
    if len(results) == 2 and any(
        all(isinstance(result, kind) for result in results) for kind in (Rollout, Batch)
    ):
        from kit.viz.samples.compare import compare_samples

        before, after = (r.rollout if isinstance(r, Batch) else r for r in results)
        return compare_samples(before, after, n)
    names = " and a ".join(type(thing).__name__ for thing in results) or "nothing"
    raise DataError(
        f"A {names} cannot be compared.",
        fix="give two of Rollout, or two of Batch, or the folders of runs.",
    )
