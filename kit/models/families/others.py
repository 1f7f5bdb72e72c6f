"""Families of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import Family


def _minimax(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What files of Transformers leave out: there it is the same for all."""
    rotation = settings.get("rope_parameters") or {}
    part = rotation.get("partial_rotary_factor", 1.0)
    return {
        "scoring_func": "sigmoid",
        "use_qk_norm": True,
        "use_routing_bias": True,
        "rotary_dim": settings.get("rotary_dim") or int(settings["head_dim"] * part),
    }


FAMILIES = (
    Family("ApertusForCausalLM", "Apertus", "xIELU, norms of q and k", mends=("xielu",)),
    Family("Exaone4ForCausalLM", "EXAONE 4", "windows by layer, norms of q and k, and after parts"),
    Family("HunYuanDenseV1ForCausalLM", "HunYuan", "norms of q and k after the rotation"),
    Family(
        "Llama4ForCausalLM",
        "Llama 4",
        "attention in chunks, mixture of experts",
        refused="SGLang's text class of it does not load experts.gate_up_proj of its files and "
        "says nothing: log-probs are 6.5 nats off.",
    ),
    Family(
        "MiniMaxM2ForCausalLM",
        "MiniMax-M2",
        "mixture of experts with a router bias, norms of all of q and k, partial rotation",
        overrides=_minimax,
        mends=("whole_norms",),
    ),
    Family(
        "StableLmForCausalLM",
        "StableLM",
        "partial rotation, LayerNorm",
        refused="Transformers does not call its attention through its interface, so samples that "
        "are packed would see each other.",
    ),
)
