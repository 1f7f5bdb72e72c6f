"""DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import Family, quantized


def _routing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What files of Transformers leave out: there it is the same for all."""
    return {
        "moe_layer_freq": settings.get("moe_layer_freq", 1),
        "topk_method": settings.get("topk_method", "noaux_tc"),
        "scoring_func": settings.get("scoring_func", "sigmoid"),
    }


FAMILIES = (
    Family(
        "DeepseekV3ForCausalLM",
        "DeepSeek-V3",
        "latent attention, mixture of experts in groups with shared ones and a router bias",
        engine={"disable_shared_experts_fusion": True},  # a further expert in the records
        refuses=quantized,
        overrides=_routing,
        mends=("latent_attention",),
        replays=True,
        adapts=True,
        drafts=True,
    ),
)
