"""Granite, Granite MoE."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family(
        "GraniteForCausalLM",
        "Granite",
        "scales of embeddings, scores, residuals and logits",
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "GraniteMoeForCausalLM",
        "Granite MoE",
        "mixture of experts, scales as Granite",
        feed_forward="block_sparse_moe",
        adapts=True,
        engine_adapts=True,
    ),
)
