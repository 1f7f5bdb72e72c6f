"""Cohere, Cohere 2."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family("CohereForCausalLM", "Cohere", "attention beside feed-forward part, scaled logits"),
    Family("Cohere2ForCausalLM", "Cohere 2", "as Cohere, windows by layer", mends=("windows",)),
)
