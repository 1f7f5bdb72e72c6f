"""Qwen2, Qwen3 and their mixtures of experts: where there is a window, some layers have it.

SGLang's classes of them attend to everything, and its Qwen3-MoE has experts in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kit.models.families.record import Family

BY_SEQUENCE = (
    "Its linear attention is computed sequence by sequence, which was tried on CPUs only: a GPU "
    "compiles layers, and how many sequences there are would be part of the code."
)


def _interval(settings: Mapping[str, Any]) -> int:
    """After how many layers one of full attention comes; 0 where they come otherwise."""
    kinds = [kind == "full_attention" for kind in settings.get("layer_types") or ()]
    if not kinds:
        return int(settings.get("full_attention_interval") or 0)
    for interval in range(1, len(kinds) + 1):
        if all(full == ((n + 1) % interval == 0) for n, full in enumerate(kinds)):
            return interval
    return 0


def _hybrid(settings: Mapping[str, Any]) -> dict[str, Any]:
    """SGLang has a configuration of its own for Qwen3-Next, of older Transformers' names."""
    rotation = settings.get("rope_parameters") or settings
    return {
        "full_attention_interval": _interval(settings),
        "rope_theta": rotation.get("rope_theta", 10_000.0),
        "partial_rotary_factor": rotation.get("partial_rotary_factor", 0.25),
    }


def _irregular(settings: Mapping[str, Any]) -> str:
    if _interval(settings):
        return ""
    return "SGLang has a layer of full attention after every so many; those of layer_types differ."


FAMILIES = (
    Family(
        "Qwen2ForCausalLM",
        "Qwen2",
        "biases of q, k and v; windows by layer",
        mends=("windows",),
        exact=True,
        quantizes=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
        heads=True,
        eagle3=True,
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "Qwen2-MoE",
        "mixture of experts with a gated shared one, biases of q, k and v",
        mends=("windows", "shared_gate"),
        replays=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Qwen3ForCausalLM",
        "Qwen3",
        "norms of q and k; windows by layer",
        mends=("windows",),
        exact=True,
        quantizes=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
        heads=True,
        eagle3=True,
    ),
    Family(
        "Qwen3NextForCausalLM",
        "Qwen3-Next",
        "three of four layers of linear attention, gated attention, mixture of experts",
        refused_on={"cuda": BY_SEQUENCE},
        refuses=_irregular,
        overrides=_hybrid,
        mends=("shared_gate", "linear_attention"),
        carries_state=("Qwen3NextGatedDeltaNet",),
        adapts=True,
        replays=True,
    ),
    Family(
        "Qwen3MoeForCausalLM",
        "Qwen3-MoE",
        "mixture of experts, norms of q and k",
        mends=("dense_layers", "windows"),
        exact=True,
        replays=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Qwen3_5ForCausalLM",
        "Qwen3.5",
        "three of four layers of linear attention, gated attention",
        refused="SGLang has it with pictures only (Qwen3_5ForConditionalGeneration).",
    ),
)
