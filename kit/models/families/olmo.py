"""OLMo, OLMo 2, OLMo 3, OLMoE."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import Family


def _rotation(settings: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang has a configuration of its own for OLMo 3, of older Transformers' names."""
    rotation = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    rotation.setdefault("rope_type", "default")
    rotation.setdefault("rope_theta", settings.get("rope_theta", 10_000.0))
    return {"rope_parameters": rotation}


def _scaled(settings: Mapping[str, Any]) -> str:
    rotation = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rotation.get("rope_type") or rotation.get("type") or "default"
    if kind == "default":
        return ""
    return (
        f"Its rope scaling ({kind}) is in every layer in Transformers 5.12, and in those without a "
        "window in SGLang, whose own reading of its config.json also fails."
    )


FAMILIES = (
    Family(
        "OlmoForCausalLM",
        "OLMo",
        "LayerNorm without weights",
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Olmo2ForCausalLM",
        "OLMo 2",
        "norms after attention and feed-forward part",
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Olmo3ForCausalLM",
        "OLMo 3",
        "as OLMo 2, windows by layer",
        overrides=_rotation,
        refuses=_scaled,
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "OlmoeForCausalLM",
        "OLMoE",
        "mixture of experts, norms of all of q and k",
        mends=("routers",),
        adapts=True,
        engine_adapts=True,
        replays=True,
        drafts=True,
    ),
)
