"""gpt-oss."""

from __future__ import annotations

from kit.models.families.record import TAKEN, Family, quantized

SWIGLU_LIMIT = 7.0
"""Where Transformers clamps the two inputs of the gate, whatever config.json says."""

FAMILIES = (
    Family(
        "GptOssForCausalLM",
        "gpt-oss",
        "attention sinks, windows by layer, mixture of experts with biases and a clamped gate",
        engine={"moe_runner_backend": "triton", "disable_hybrid_swa_memory": True},
        engine_on={"cpu": TAKEN},
        refuses=quantized,
        overrides=lambda _: {"swiglu_limit": SWIGLU_LIMIT},
        mends=("attention_name", "sinks"),
        adapts=True,
        engine_adapts=True,
        replays=True,
        drafts=True,
    ),
)
