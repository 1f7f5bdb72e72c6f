"""The error for a model that trainer and engine cannot compute with the same operators."""

from __future__ import annotations

from kit.errors import ModelError


def unknown(what: str) -> ModelError:
    """The error for a model of which something has no shared operator."""
    return ModelError(
        f"training.true_on_policy cannot be had with this model: {what}.",
        why="Trainer and engine have no operator that would give the same bits.",
        fix="train another model, or leave training.true_on_policy off.",
    )
