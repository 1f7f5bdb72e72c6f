"""Families of one model."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family("ApertusForCausalLM", "Apertus", "xIELU, norms of q and k"),
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
        "StableLmForCausalLM",
        "StableLM",
        "partial rotation, LayerNorm",
        refused="Transformers does not call its attention through its interface, so samples that "
        "are packed would see each other.",
    ),
)
