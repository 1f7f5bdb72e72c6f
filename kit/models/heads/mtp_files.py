"""Layers that predict a further token in the files of models: whether they can draft."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.models.source import copied_by, mtp_weights, safetensors_header, stored_shapes
from kit.utils.reading import read_json

ENGINE = {"MiMoForCausalLM": "MiMoMTP", "Glm4MoeForCausalLM": "Glm4MoeForCausalLMNextN"}
"""SGLang's class of the layer, by the architecture of the model."""
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
    if settings.get("n_group", 1) != 1:
        return f"its experts are in {settings['n_group']} groups, with which none was tried"
    wanted, stored = shapes(settings), stored_shapes(Path(path))
    own = (name for name in mtp_weights(Path(path)) if not copied_by(name))
    stored = {name: stored[name] for name in own}
    if missing := sorted(wanted.keys() - stored.keys()):
        return f"its files lack {', '.join(missing[:3])}"
    if others := sorted(stored.keys() - wanted.keys()):
        return f"its files have {', '.join(others[:3])}, which the layer has no place for"
    if wrong := [name for name, shape in wanted.items() if stored[name] != shape]:
        return f"{wrong[0]} is {stored[wrong[0]]} there, and {wanted[wrong[0]]} by its config.json"
    return ""


def size_of(path: str | Path) -> int:
    """Bytes of a model's layers that predict further tokens, in its files."""
    total, own = 0, mtp_weights(Path(path))
    for file in set(own.values()):
        _, tensors = safetensors_header(file)
        named = (name for name in own if name in tensors and not copied_by(name))
        offsets = (tensors[name]["data_offsets"] for name in named)
        total += sum(end - begin for begin, end in offsets)
    return total


def prefix_of(settings: Mapping[str, Any]) -> str:
    """How the names of the layer's weights begin in a model's files, by its config.json."""
    if settings.get("model_type") == "mimo":
        return "model.mtp_layers.0."
    return f"model.layers.{settings['num_hidden_layers']}."


def shapes(settings: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight of the layer by its name, from config.json."""
    width, heads = int(settings["hidden_size"]), int(settings["num_attention_heads"])
    pairs = int(settings.get("num_key_value_heads") or heads)
    size = int(settings.get("head_dim") or width // heads)
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
        "self_attn.q_proj.weight": (heads * size, width),
        "self_attn.k_proj.weight": (pairs * size, width),
        "self_attn.v_proj.weight": (pairs * size, width),
        "self_attn.o_proj.weight": (width, heads * size),
    }
    is_mimo = settings.get("model_type") == "mimo"
    if is_mimo or settings.get("attention_bias"):
        rows = {"q": heads, "k": pairs, "v": pairs}
        layer |= {f"self_attn.{name}_proj.bias": (rows[name] * size,) for name in rows}
    if not is_mimo and settings.get("use_qk_norm"):
        layer |= {f"self_attn.{name}_norm.weight": (size,) for name in "qk"}
    layer |= _of_mimo(settings, width) if is_mimo else _of_glm(settings, width)
    return {prefix_of(settings) + name: shape for name, shape in layer.items()}


def _of_mimo(settings: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    norms = ("token_layernorm", "hidden_layernorm", "final_layernorm")
    return {
        **{f"{name}.weight": (width,) for name in norms},
        "input_proj.weight": (width, 2 * width),
        **_feed_forward("mlp", width, int(settings["intermediate_size"])),
    }


def _of_glm(settings: Mapping[str, Any], width: int) -> dict[str, tuple[int, ...]]:
    wide, experts = int(settings["moe_intermediate_size"]), int(settings["n_routed_experts"])
    found: dict[str, tuple[int, ...]] = {
        **{f"{name}.weight": (width,) for name in ("enorm", "hnorm", "shared_head.norm")},
        "eh_proj.weight": (width, 2 * width),
        "mlp.gate.weight": (experts, width),
        "mlp.gate.e_score_correction_bias": (experts,),
        **_feed_forward("mlp.shared_experts", width, wide * int(settings["n_shared_experts"])),
    }
    for expert in range(experts):
        found |= _feed_forward(f"mlp.experts.{expert}", width, wide)
    return found


def _feed_forward(name: str, width: int, wide: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{name}.gate_proj.weight": (wide, width),
        f"{name}.up_proj.weight": (wide, width),
        f"{name}.down_proj.weight": (width, wide),
    }
