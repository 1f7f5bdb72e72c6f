"""gpt-oss."""

from __future__ import annotations

from kit.models.families.record import Family

FAMILIES = (
    Family(
        "GptOssForCausalLM",
        "gpt-oss",
        "attention sinks, windows by layer, mixture of experts with biases and a clamped gate",
    ),
)
