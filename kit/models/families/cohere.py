"""Cohere, Cohere 2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import Family


def _untied(settings: Mapping[str, Any]) -> str:
    if settings.get("tie_word_embeddings", True):
        return ""
    return "SGLang takes the embedding for its output layer, which here is another weight."


FAMILIES = (
    Family(
        "CohereForCausalLM",
        "Cohere",
        "attention beside feed-forward part, scaled logits",
        refuses=_untied,
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Cohere2ForCausalLM",
        "Cohere 2",
        "as Cohere, windows by layer",
        refuses=_untied,
        mends=("windows",),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
)
