"""Phi, Phi-3."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family("PhiForCausalLM", "Phi", "a bias of the output layer, LayerNorm, partial rotation"),
    Family(
        "Phi3ForCausalLM",
        "Phi-3",
        "one weight for q, k and v; a window",
        mends=("windows",),
        adapts=True,
        drafts=True,
    ),
)
