"""Qwen2, Qwen3 and their mixtures of experts: where there is a window, some layers have it.

SGLang's classes of them attend to everything, and its Qwen3-MoE has experts in every layer.
"""

from __future__ import annotations

from kit.models.families.record import Family

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
