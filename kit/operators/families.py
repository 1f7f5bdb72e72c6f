"""Models that engine and trainer can compute with the same operators."""

from __future__ import annotations

from kit.errors import ConfigError, ModelError

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
"""Architectures of which every operator is known on both sides."""
DEVICES = ("cpu", "cuda")


def refuse_others(
    architecture: str, device: str, dtype: str = "bfloat16", attention: str = "auto"
) -> None:
    """Refuse a model, a device, a dtype or an attention backend without shared operators.

    Raises:
        ModelError: the architecture is not one of `FAMILIES`.
        ConfigError: the device is not one of `DEVICES`, or a GPU is to compute in
            another dtype than bfloat16, or a CPU to compute attention in a way of its own.
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
    if device == "cpu" and attention != "auto":
        raise ConfigError(
            f"training.true_on_policy has its own attention on a CPU, and not {attention!r}.",
            fix=f"leave engine.attention_backend out, {off}.",
        )


def unknown(what: str) -> ModelError:
    """The error for a model of which something has no shared operator."""
    return ModelError(
        f"training.true_on_policy cannot be had with this model: {what}.",
        why="Trainer and engine have no operator that would give the same bits.",
        fix="train another model, or leave training.true_on_policy off.",
    )
