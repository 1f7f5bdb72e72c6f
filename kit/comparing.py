"""`kit.compare`: two results of the same kind, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kit.errors import DataError
from kit.samples import Batch, Rollout
from kit.viz.html import Picture


def compare(before: Any, after: Any, n: int = 8) -> Picture:
    """What training changed: the same prompts before and after, side by side.

    Of rollouts or batches that were annotated with the weights before and after an update, also
    which tokens gained and which lost probability:

        before = session.annotate(rollout)
        session.update(session.advantages(rollout))
        after = session.annotate(before)
        kit.compare(before, after)

    Args:
        before: a rollout or a batch.
        after: another one.
        n: how many prompts are shown.

    Raises:
        DataError: there is no way to compare these two.
    """
    for kind, draw in _COMPARISONS.items():
        if isinstance(before, kind) and isinstance(after, kind):
            return draw(before, after, n)
    names = " and a ".join(type(thing).__name__ for thing in (before, after))
    kinds = ", or two of ".join(kind.__name__ for kind in _COMPARISONS)
    raise DataError(f"A {names} cannot be compared.", fix=f"give two of {kinds}.")


def _rollouts(before: Rollout, after: Rollout, n: int) -> Picture:
    from kit.viz.compare import compare_samples

    return compare_samples(before, after, n)


def _batches(before: Batch, after: Batch, n: int) -> Picture:
    return _rollouts(before.rollout, after.rollout, n)


_COMPARISONS: dict[type, Callable[[Any, Any, int], Picture]] = {
    Rollout: _rollouts,
    Batch: _batches,
}
"""How two of a kind are compared."""
