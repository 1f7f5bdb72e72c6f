"""Gemma, Gemma 2, Gemma 3."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family("GemmaForCausalLM", "Gemma", "scaled embeddings, norms of 1 + weight, GeGLU"),
    Family("Gemma2ForCausalLM", "Gemma 2", "soft caps on scores and logits, windows by layer"),
    Family(
        "Gemma3ForCausalLM", "Gemma 3", "windows by layer with a rotation of their own, more norms"
    ),
)
