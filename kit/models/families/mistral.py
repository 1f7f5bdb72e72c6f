"""Mistral, Mixtral, StarCoder2: where there is a window, every layer has it.

SGLang's classes of them attend to everything.
"""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family(
        "MistralForCausalLM",
        "Mistral",
        "a window",
        mends=("windows",),
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "MixtralForCausalLM",
        "Mixtral",
        "mixture of experts, a window",
        mends=("routers", "windows"),
        replays=True,
        adapts=True,
        engine_adapts=True,
        drafts=True,
    ),
    Family(
        "Starcoder2ForCausalLM",
        "StarCoder2",
        "a window, LayerNorm, biases, no gate",
        mends=("windows",),
        adapts=True,
        drafts=True,
    ),
)
