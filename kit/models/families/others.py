"""Families of one model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import TAKEN, Family


def _exaone(settings: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang asks for older names, and takes the pattern of windows as letters only."""
    pattern = settings.get("sliding_window_pattern") or None
    if isinstance(pattern, int):
        pattern = "L" * (pattern - 1) + "G"
    rotation = settings.get("rope_parameters") or settings
    theta = rotation.get("rope_theta", 10_000.0)
    return {"sliding_window_pattern": pattern, "rope_theta": theta}


def _mimo(settings: Mapping[str, Any]) -> str:
    if settings.get("use_sliding_window"):
        return "It has windows (use_sliding_window), with which none was compared."
    return ""


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
    Family(
        "ApertusForCausalLM",
        "Apertus",
        "xIELU, norms of q and k",
        mends=("xielu",),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Exaone4ForCausalLM",
        "EXAONE 4",
        "windows by layer, norms of q and k, and after parts",
        engine={"disable_hybrid_swa_memory": True},
        engine_on={"cpu": TAKEN},
        overrides=_exaone,
        mends=("attention_name", "exaone", "windows"),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "HunYuanDenseV1ForCausalLM",
        "HunYuan",
        "norms of q and k after the rotation",
        overrides=lambda _: {"use_qk_norm": True},
        mends=("flat_heads",),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
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
        mends=("routers", "whole_norms"),
        replays=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "MiMoForCausalLM",
        "MiMo",
        "biases of q, k and v; a layer more, which predicts a further token",
        refuses=_mimo,
        adapts=True,
        engine_adapts=True,
        drafts=True,
        heads=True,
        mtp=True,
    ),
    Family(
        "NanoChatForCausalLM",
        "NanoChat",
        "rotation backwards and before the norms of q and k, norms without weights, a soft cap",
        adapts=True,
        drafts=True,
    ),
    Family(
        "NanoChat2026ForCausalLM",
        "nanochat since March 2026",
        "NanoChat with embeddings of values, of the token before, windows, and scalars by layer",
        engine={"disable_hybrid_swa_memory": True},
        undrafted="Each token needs the one before it, and tokens of a draft do not lie in the "
        "cache in their order. Its layers differ by turns, so it is not made shorter.",
    ),
    Family(
        "StableLmForCausalLM",
        "StableLM",
        "partial rotation, LayerNorm",
        refused="Transformers does not call its attention through its interface, so samples that "
        "are packed would see each other.",
    ),
)
