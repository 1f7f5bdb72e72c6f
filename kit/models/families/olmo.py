"""OLMo, OLMo 2, OLMo 3, OLMoE."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family("OlmoForCausalLM", "OLMo", "LayerNorm without weights"),
    Family("Olmo2ForCausalLM", "OLMo 2", "norms after attention and feed-forward part"),
    Family("Olmo3ForCausalLM", "OLMo 3", "as OLMo 2, windows by layer"),
    Family("OlmoeForCausalLM", "OLMoE", "mixture of experts, norms of all of q and k"),
)
