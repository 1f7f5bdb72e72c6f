"""DeepSeek-V3."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family(
        "DeepseekV3ForCausalLM",
        "DeepSeek-V3",
        "latent attention, mixture of experts in groups with shared ones and a router bias",
    ),
)
