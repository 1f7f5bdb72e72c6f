"""Qwen2, Qwen3 and their mixtures of experts: where there is a window, some layers have it.

SGLang's classes of them attend to everything, and its Qwen3-MoE has experts in every layer.
"""

from __future__ import annotations

from kit.models.families.record import Family

BY_SEQUENCE = (
    "Its linear attention is computed sequence by sequence, which was tried on CPUs only: a GPU "
    "compiles layers, and how many sequences there are would be part of the code."
)

FAMILIES = (
    Family(
        "Qwen2ForCausalLM",
        "Qwen2",
        "biases of q, k and v; windows by layer",
        mends=("windows",),
        exact=True,
        quantizes=True,
    ),
    Family(
        "Qwen2MoeForCausalLM",
        "Qwen2-MoE",
        "mixture of experts with a gated shared one, biases of q, k and v",
        mends=("windows", "shared_gate"),
        replays=True,
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
    ),
    Family(
        "Qwen3NextForCausalLM",
        "Qwen3-Next",
        "three of four layers of linear attention, gated attention, mixture of experts",
        refused_on={"cuda": BY_SEQUENCE},
        carries_state=("Qwen3NextGatedDeltaNet",),
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
    ),
)
