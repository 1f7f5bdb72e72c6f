"""Models that engine and trainer can compute with the same operators."""

from __future__ import annotations

from kit.errors import ConfigError, ModelError

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures of which every operator is known on both sides."""
DEVICES = ("cpu", "cuda")


def refuse_others(architecture: str, device: str, dtype: str = "bfloat16") -> None:
    """Refuse a model, a device or a dtype for which there are no shared operators.

    Raises:
        ModelError: the architecture is not one of `FAMILIES`.
        ConfigError: the device is not one of `DEVICES`, or a GPU is to compute in another dtype
            than bfloat16.
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
            f"training.true_on_policy has no operators for {device}.",
            fix=f"set device to one of {', '.join(DEVICES)}, {off}.",
        )
    if device == "cuda" and dtype != "bfloat16":
        raise ConfigError(
            f"training.true_on_policy has no operators for {dtype} on a GPU.",
            fix=f"set model.dtype: bfloat16, {off}.",
        )


def unknown(what: str) -> ModelError:
    """The error for a model of which something has no shared operator."""
    return ModelError(
        f"training.true_on_policy cannot be had with this model: {what}.",
        why="Trainer and engine have no operator that would give the same bits.",
        fix="train another model, or leave training.true_on_policy off.",
    )
