"""Gemma, Gemma 2, Gemma 3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import Family


def _activation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang asks for the activation by an older name too."""
    name = settings.get("hidden_activation") or "gelu_pytorch_tanh"
    return {"hidden_act": name, "hidden_activation": name}


FAMILIES = (
    Family(
        "GemmaForCausalLM",
        "Gemma",
        "scaled embeddings, norms of 1 + weight, GeGLU",
        mends=("gemma",),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Gemma2ForCausalLM",
        "Gemma 2",
        "soft caps on scores and logits, windows by layer",
        overrides=_activation,
        mends=("windows",),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Gemma3ForCausalLM",
        "Gemma 3",
        "windows by layer with a rotation of their own, more norms",
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Gemma3nForCausalLM",
        "Gemma 3n",
        "embeddings in every layer, layers that share keys and values",
        refused="SGLang 0.5.16 computes it otherwise than Transformers: 0.95 nats a token off.",
    ),
)
