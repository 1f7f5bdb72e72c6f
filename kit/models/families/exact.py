"""Which models engine and trainer can compute with the same operators."""

from __future__ import annotations

from kit.errors import ConfigError, ModelError
from kit.models.families import all_families, find

DEVICES = ("cpu", "cuda")


def refuse_others(
    architecture: str, device: str, dtype: str = "bfloat16", attention: str = "auto"
) -> None:
    """Refuse a model, a device, a dtype or an attention backend without shared operators.

    Raises:
        ModelError: the architecture's record does not say `exact`.
        ConfigError: the device is not one of `DEVICES`, or a GPU is to compute in
            another dtype than bfloat16, or a CPU to compute attention in a way of its own.
    """
    off = "or leave training.true_on_policy off"
    if not find(architecture).exact:
        known = [family.architecture for family in all_families() if family.exact]
        raise ModelError(
            f"training.true_on_policy does not know {architecture}.",
            why=f"Engine and trainer have the same operators for {', '.join(known)} only.",
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
