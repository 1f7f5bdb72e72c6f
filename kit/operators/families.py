"""Models that engine and trainer can compute with the same operators."""

from __future__ import annotations

from kit.errors import ConfigError, ModelError

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of which every operator is known on both sides."""
DEVICES = ("cpu",)


def refuse_others(architecture: str, device: str) -> None:
    """Refuse a model or a device for which there are no shared operators.

    Raises:
        ModelError: the architecture is not one of `FAMILIES`.
        ConfigError: the device is not one of `DEVICES`.
    """
    off = "or leave training.true_on_policy off"
    if architecture not in FAMILIES:
        raise ModelError(
            f"training.true_on_policy does not know {architecture}.",
            why=f"Engine and trainer have the same operators for {', '.join(FAMILIES)} only.",
            fix=f"train one of these, {off}.",
        )
    if device not in DEVICES:
        raise ConfigError(
            f"training.true_on_policy has no operators for {device} yet.",
            fix=f"set model.device: cpu, {off}.",
        )
