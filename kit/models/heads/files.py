"""Directories of EAGLE heads: what is in them, and whether they go with a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.models.source import stored_shapes
from kit.utils.reading import read_json

ARCHITECTURE = "LlamaForCausalLMEagle"
"""SGLang's name for the heads that the kit has."""


def problem_of(path: str | Path, model: str | Path) -> str:
    """Why a directory's head cannot draft for a model, in words; empty where it can.

    Args:
        path: the head's directory; config.json and weights are there.
        model: the model's directory.
    """
    head, policy = (read_json(Path(p) / "config.json", unique=False) for p in (path, model))
    layers, width = head.get("num_hidden_layers"), head.get("hidden_size")
    if ARCHITECTURE not in (head.get("architectures") or ()):
        named = ", ".join(map(str, head.get("architectures") or ["nothing"]))
        return f"its config.json names {named}, and not {ARCHITECTURE}"
    if layers != 1:
        return f"it has {layers} layers, and heads of one layer are what was tried"
    if width != policy.get("hidden_size"):
        return f"it reads hidden states of {width} numbers; the model's {policy.get('hidden_size')}"
    if head.get("tie_word_embeddings"):
        return "tie_word_embeddings is true there, and SGLang gives it the model's one by one"
    if head.get("attention_bias") or head.get("mlp_bias"):
        return "its layer has biases, of which SGLang leaves some out"
    rotation = head.get("rope_parameters") or head.get("rope_scaling") or {}
    if (kind := rotation.get("rope_type") or rotation.get("type") or "default") != "default":
        return f"its rotation is scaled ({kind}), with which no head was tried"
    wanted, stored = shapes(head), stored_shapes(Path(path))
    if missing := sorted(wanted.keys() - stored.keys()):
        return f"its files lack {', '.join(missing[:3])}"
    if others := sorted(stored.keys() - wanted.keys()):
        return f"its files have {', '.join(others[:3])}, which it has no place for"
    if wrong := [name for name, shape in wanted.items() if stored[name] != shape]:
        return f"{wrong[0]} is {stored[wrong[0]]} there, and {wanted[wrong[0]]} by its config.json"
    return ""


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of a head by its name, from its config.json."""
    width, wide = int(settings["hidden_size"]), int(settings["intermediate_size"])
    heads = int(settings["num_attention_heads"])
    pairs = int(settings.get("num_key_value_heads") or heads)
    size = int(settings.get("head_dim") or width // heads)
    layer = {
        "self_attn.q_proj": (heads * size, width),
        "self_attn.k_proj": (pairs * size, width),
        "self_attn.v_proj": (pairs * size, width),
        "self_attn.o_proj": (width, heads * size),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (wide, width),
        "mlp.up_proj": (wide, width),
        "mlp.down_proj": (width, wide),
    }
    return {
        "fc.weight": (width, 2 * width),
        "fc.bias": (width,),
        **{f"layers.0.{name}.weight": shape for name, shape in layer.items()},
    }
