"""Routers: the layer that SGLang does not tell some of them, and weights that one keeps a copy of.

Without their layer the experts of Mixtral and OLMoE are not recorded. GLM-4.5's router would go on
with the first weights, whatever a sync brings.
    relies on   models/mixtral.py and others: `topk` beside `experts`, which knows its layer
                layers/moe/topk.py: TopK.layer_id
                models/glm4_moe.py: Glm4MoeGate.forward, weight
"""

from __future__ import annotations

from typing import Any

from kit.engine.families.making import when_made


def register(architecture: str, _device: str) -> None:
    """Change models of this architecture that this process makes."""
    when_made(architecture, _tell_layers)
    if architecture == "Glm4MoeForCausalLM":
        from sglang.srt.models import glm4_moe

        gate: Any = glm4_moe.Glm4MoeGate
        gate.forward = _logits


def _tell_layers(model: Any, _config: Any) -> None:
    for part in model.modules():
        topk = getattr(part, "topk", None)
        if topk is not None and getattr(topk, "layer_id", 0) is None:
            topk.layer_id = part.experts.layer_id


def _logits(gate: Any, hidden_states: Any) -> Any:
    from torch.nn import functional

    return functional.linear(hidden_states.float(), gate.weight.float())
