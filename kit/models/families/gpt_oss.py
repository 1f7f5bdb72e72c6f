"""gpt-oss."""

from __future__ import annotations

from kit.models.families.record import Family

SWIGLU_LIMIT = 7.0
"""Where Transformers clamps the two inputs of the gate, whatever config.json says."""

FAMILIES = (
    Family(
        "GptOssForCausalLM",
        "gpt-oss",
        "attention sinks, windows by layer, mixture of experts with biases and a clamped gate",
        engine={"moe_runner_backend": "triton", "disable_hybrid_swa_memory": True},
        # SGLang refuses a backend of another name than these; the mend makes it the CPU's own.
        engine_on={
            "cpu": {"prefill_attention_backend": "triton", "decode_attention_backend": "triton"}
        },
        overrides=lambda _: {"swiglu_limit": SWIGLU_LIMIT},
        mends=("gpt_oss",),
    ),
)
