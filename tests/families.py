"""Tiny models of random weights, one of each family, with the tiny model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from kit.tiny import MODEL_DIR

WINDOW = 8
COMMON = {
    "vocab_size": 104,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
PARTIAL = {"head_dim": 16, "partial_rotary_factor": 0.5}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WINDOWED = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
GEMMA = {"head_dim": 16, "tie_word_embeddings": True}
SCALED = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Cohere": {"logit_scale": 0.25},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": WINDOW, **GEMMA},
    "Ernie4_5": {"head_dim": 16},
    "Exaone4": {"sliding_window": WINDOW, "sliding_window_pattern": 2, "head_dim": 16},
    "Gemma": GEMMA,
    "Gemma2": {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, **GEMMA},
    "Gemma3": {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, **GEMMA},
    "Glm": PARTIAL,
    "Glm4": PARTIAL,
    "Glm4Moe": {"n_routed_experts": 4, **EXPERTS, **PARTIAL},
    "GptOss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "Granite": {"logits_scaling": 4.0},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Helium": {"head_dim": 16},
    "HunYuanDenseV1": {"head_dim": 16},
    "Llama": {},
    "Llama, dynamic rope": {"rope_parameters": {"rope_type": "dynamic", **SCALED}},
    "Llama, yarn": {
        "rope_parameters": {"rope_type": "yarn", "attention_factor": 1.0, **SCALED},
    },
    "Mistral": {"sliding_window": None},
    "Mistral, window": {"sliding_window": WINDOW},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "NanoChat": {},
    "Olmo": {"num_key_value_heads": 4},
    "Olmo2": {},
    "Olmo3": {"sliding_window": WINDOW},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Persimmon": {"num_key_value_heads": 4},
    "Phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "Phi3": {"sliding_window": None},
    "Phi3, window": {"sliding_window": WINDOW},
    "Qwen2": {},
    "Qwen2, window": WINDOWED,
    "Qwen2Moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, **EXPERTS},
    "Qwen3": {"head_dim": 16},
    "Qwen3, window": {"head_dim": 16, **WINDOWED},
    "Qwen3Moe": {"head_dim": 16, "decoder_sparse_step": 1, **EXPERTS},
    "SeedOss": {"head_dim": 16},
    "SmolLM3": {},
    "StableLm": {"partial_rotary_factor": 0.5},
    "Starcoder2": {},
    "Starcoder2, window": {"sliding_window": WINDOW},
}
"""What each family's configuration says beyond `COMMON`."""


def make_model(folder: Path, family: str) -> Path:
    """Write a model of random weights whose special parts all matter: a directory to start from."""
    import transformers

    torch.manual_seed(0)
    kind = family.partition(",")[0]
    config_kind = "Gemma3Text" if kind == "Gemma3" else kind
    config = getattr(transformers, f"{config_kind}Config")(**COMMON | FAMILIES[family])
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("bias"):
                value.normal_(0, 0.5)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (MODEL_DIR / file).is_file():
            shutil.copy(MODEL_DIR / file, folder)
    return folder
