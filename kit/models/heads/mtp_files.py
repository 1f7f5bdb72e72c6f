"""Layers that predict a further token in the files of models: whether they can draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.models.source import mtp_weights, safetensors_header, stored_shapes
from kit.utils.reading import read_json

ENGINE = {"MiMoForCausalLM": "MiMoMTP"}
"""SGLang's class of the layer, by the architecture of the model."""
PREFIXES = {"MiMoMTP": "model.mtp_layers.0."}
"""How the names of its weights begin in the model's files, by SGLang's class."""

TAKEN = frozenset(
    {
        "BailingMoeForCausalLM", "BailingMoeV2ForCausalLM", "BailingMoeV2_5ForCausalLM",
        "DeepseekV32ForCausalLM", "DeepseekV3ForCausalLM", "DeepseekV4ForCausalLM",
        "Ernie4_5_MoeForCausalLM", "ExaoneMoEForCausalLM", "Glm4MoeForCausalLM",
        "Glm4MoeLiteForCausalLM", "GlmMoeDsaForCausalLM", "GlmOcrForConditionalGeneration",
        "HYV3ForCausalLM", "InklingForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration", "LongcatFlashForCausalLM", "MiMoForCausalLM",
        "MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM", "NemotronHForCausalLM",
        "NemotronHPuzzleForCausalLM", "Qwen3MoeForCausalLM", "Qwen3NextForCausalLM",
        "Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration",
        "Step3p5ForCausalLM", "Step3p7ForConditionalGeneration",
    }
)  # fmt: skip
"""Architectures of which SGLang takes this layer where it is to take the whole model as a draft:
its ModelConfig._config_draft_model."""


def problem_of(path: str | Path) -> str:
    """Why a model's own layer cannot draft for it, in words; empty where it can.

    Args:
        path: the model's directory; config.json and weights are there.
    """
    settings = read_json(Path(path) / "config.json", unique=False)
    count = settings.get("num_nextn_predict_layers") or 0
    if not count or not mtp_weights(Path(path)):
        return (
            f"its config.json names {count} layers that predict further tokens "
            f"(num_nextn_predict_layers), and its files have {len(mtp_weights(Path(path)))} "
            "weights of such layers"
        )
    if count != 1:
        return (
            f"it has {count} layers that predict further tokens, of which SGLang loads each over "
            "the one before, and drafts with the last alone"
        )
    if settings.get("tie_word_embeddings"):
        return "tie_word_embeddings is true there, with which no such layer was tried"
    if settings.get("use_sliding_window"):
        return "it has windows (use_sliding_window), with which no such layer was tried"
    rotation = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    if (kind := rotation.get("rope_type") or rotation.get("type") or "default") != "default":
        return f"its rotation is scaled ({kind}), with which no such layer was tried"
    wanted, stored = shapes(settings), stored_shapes(Path(path))
    stored = {name: stored[name] for name in mtp_weights(Path(path))}
    if missing := sorted(wanted.keys() - stored.keys()):
        return f"its files lack {', '.join(missing[:3])}"
    if others := sorted(stored.keys() - wanted.keys()):
        return f"its files have {', '.join(others[:3])}, which the layer has no place for"
    if wrong := [name for name, shape in wanted.items() if stored[name] != shape]:
        return f"{wrong[0]} is {stored[wrong[0]]} there, and {wanted[wrong[0]]} by its config.json"
    return ""


def size_of(path: str | Path) -> int:
    """Bytes of a model's layers that predict further tokens, in its files."""
    total = 0
    for file in set(mtp_weights(folder := Path(path)).values()):
        _, tensors = safetensors_header(file)
        offsets = (tensors[name]["data_offsets"] for name in mtp_weights(folder) if name in tensors)
        total += sum(end - begin for begin, end in offsets)
    return total


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of MiMo's layer by its name, from its config.json."""
    width, wide = int(settings["hidden_size"]), int(settings["intermediate_size"])
    heads = int(settings["num_attention_heads"])
    pairs = int(settings.get("num_key_value_heads") or heads)
    size = int(settings.get("head_dim") or width // heads)
    norms = (
        "token_layernorm",
        "hidden_layernorm",
        "input_layernorm",
        "post_attention_layernorm",
        "final_layernorm",
    )
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (width,) for name in norms}
    layer |= {
        "input_proj.weight": (width, 2 * width),
        "self_attn.q_proj.weight": (heads * size, width),
        "self_attn.k_proj.weight": (pairs * size, width),
        "self_attn.v_proj.weight": (pairs * size, width),
        "self_attn.q_proj.bias": (heads * size,),
        "self_attn.k_proj.bias": (pairs * size,),
        "self_attn.v_proj.bias": (pairs * size,),
        "self_attn.o_proj.weight": (width, heads * size),
        "mlp.gate_proj.weight": (wide, width),
        "mlp.up_proj.weight": (wide, width),
        "mlp.down_proj.weight": (width, wide),
    }
    return {PREFIXES["MiMoMTP"] + name: shape for name, shape in layer.items()}
