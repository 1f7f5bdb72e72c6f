"""Models of random weights and tokenizers, small, and as unusual as a test wants them.

tokenizer           a tokenizer with one token a byte, and whatever is special about it
save                that, with a model to go with it
make_model          one of each family in `FAMILIES`, with the tiny model's tokenizer
larger              sizes of it with which a GPU's kernels compute
mixture_of_experts  the one with experts that tests start sessions of
random_model        what all of them are made with
hollow              the files of a large Qwen3: its shapes, and nothing on the disk
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from kit.models.heads import mtp_files
from kit.models.own import mimo
from kit.tiny import MODEL_DIR

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
"""Its answers begin inside a `<think>` that the prompt has opened."""

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
LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip
LATENT = {
    "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12, "head_dim": 8,
}  # fmt: skip
SCALED = {"rope_theta": 1e4, "original_max_position_embeddings": 16, "factor": 4.0}

FAMILIES: dict[str, dict[str, Any]] = {
    "Apertus": {},
    "Arcee": {},
    "Cohere": {"logit_scale": 0.25, "tie_word_embeddings": True},
    "Cohere, untied": {"tie_word_embeddings": False},
    "Cohere2": {"logit_scale": 0.25, "sliding_window": WINDOW, **GEMMA},
    "DeepseekV3": LATENT,
    "DeepseekV3, yarn": {
        "rope_parameters": {"rope_type": "yarn", "mscale": 1.0, "mscale_all_dim": 1.0, **SCALED},
        **LATENT,
    },
    "Ernie4_5": {"head_dim": 16},
    "Exaone4": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
        "sliding_window": WINDOW,
        "sliding_window_pattern": 2,
        "head_dim": 16,
    },
    "Exaone4, no window": {
        "sliding_window": None,
        "layer_types": ["full_attention"] * 2,
        "head_dim": 16,
    },
    "Gemma": GEMMA,
    "Gemma2": {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, **GEMMA},
    "Gemma3": {"query_pre_attn_scalar": 16, "sliding_window": WINDOW, **GEMMA},
    "Glm": PARTIAL,
    "Glm4": PARTIAL,
    "Glm4Moe": {"n_routed_experts": 4, **EXPERTS, **PARTIAL},
    "GptOss": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "head_dim": 16,
        "sliding_window": WINDOW,
    },
    "Granite": {"logits_scaling": 4.0},
    "GraniteMoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Helium": {"head_dim": 16},
    "HunYuanDenseV1": {"head_dim": 16},
    "Llama": {},
    "Llama, dynamic rope": {"rope_parameters": {"rope_type": "dynamic", **SCALED}},
    "Llama, yarn": {
        "rope_parameters": {"rope_type": "yarn", "attention_factor": 1.0, **SCALED},
    },
    "MiMo": {"num_nextn_predict_layers": 1, "head_dim": 16},
    "MiniMaxM2": {"num_local_experts": 4, "num_experts_per_tok": 2, **PARTIAL},
    "Mistral": {"sliding_window": None},
    "Mistral, window": {"sliding_window": WINDOW},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Mixtral, window": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": WINDOW,
    },
    "NanoChat": {"final_logit_softcapping": 2.0},
    "Olmo": {"num_key_value_heads": 4},
    "Olmo2": {},
    "Olmo3": {"sliding_window": WINDOW},
    "Olmo3, yarn": {
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "yarn", **SCALED},
    },
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4},
    "Persimmon": {"num_key_value_heads": 4},
    "Phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "Phi3": {"sliding_window": None},
    "Phi3, longrope": {
        "sliding_window": None,
        "original_max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "factor": 2.0,
            "short_factor": [1.0 + n / 8 for n in range(8)],
            "long_factor": [4.0] * 8,
        },
    },
    "Phi3, window": {"sliding_window": WINDOW},
    "Qwen2": {},
    "Qwen2, window": WINDOWED,
    "Qwen2Moe": {"shared_expert_intermediate_size": 32, "decoder_sparse_step": 1, **EXPERTS},
    "Qwen2Moe, window": {
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        **EXPERTS,
        **WINDOWED,
    },
    "Qwen3": {"head_dim": 16},
    "Qwen3, window": {"head_dim": 16, **WINDOWED},
    "Qwen3Moe": {"head_dim": 16, "decoder_sparse_step": 1, **EXPERTS},
    "Qwen3Moe, window": {"head_dim": 16, "decoder_sparse_step": 1, **EXPERTS, **WINDOWED},
    "Qwen3Next": {
        "head_dim": 16,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "layer_types": ["linear_attention", "full_attention"],
        **EXPERTS,
        **LINEAR,
    },
    "SeedOss": {"head_dim": 16},
    "SmolLM3": {},
    "StableLm": {"partial_rotary_factor": 0.5},
    "Starcoder2": {},
    "Starcoder2, window": {"sliding_window": WINDOW},
}
"""What each family's configuration says beyond `COMMON`."""
SIZES = {
    "hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 128, "head_dim": 64,
    "shared_expert_intermediate_size": 128, "query_pre_attn_scalar": 64, "initializer_range": 0.075,
    "linear_key_head_dim": 64, "linear_value_head_dim": 64, "kv_lora_rank": 512, "q_lora_rank": 128,
    "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
}  # fmt: skip


def larger(family: str) -> dict[str, Any]:
    """Sizes of a family as a GPU's kernels know them: heads of 64, latent ones as DeepSeek's."""
    settings = COMMON | FAMILIES[family]
    sizes = {name: size for name, size in SIZES.items() if name in settings}
    if "kv_lora_rank" in settings:
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    if settings.get("tie_word_embeddings") and "logit_scale" not in settings:
        sizes["initializer_range"] /= 2  # a token's own logit grows with the hidden size
    rotation = settings.get("rope_parameters", {})
    if "short_factor" in rotation:
        factors = {"short_factor": [1.0 + n / 32 for n in range(32)], "long_factor": [4.0] * 32}
        sizes["rope_parameters"] = rotation | factors
    return sizes


def tokenizer(
    *,
    special: Sequence[str] = SPECIAL,
    plain: Sequence[str] = (),
    eos: str = "<|im_end|>",
    bos: str | None = None,
    pad: str = "<|endoftext|>",
    template: str | None = CHATML,
    post: Callable[[Any], Any] | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, after the special ones.

    Args:
        special: tokens that it holds for special.
        plain: tokens of their own that it does not hold for special.
        eos: its end-of-sequence token.
        bos: its begin-of-sequence token; None has none.
        pad: its padding.
        template: its chat template; None has none.
        post: makes its post-processor, which may add tokens to a text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["a"], trainer)
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if post:
        inner.post_processor = post(inner)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=None if eos in plain else eos,
        pad_token=pad,
    )
    made.chat_template = template
    return made


def random_model(
    folder: Path,
    kind: str,
    settings: dict[str, Any],
    *,
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    biases: float | None = None,
) -> Path:
    """Save a model of random weights, the same at each call; returns the folder.

    Args:
        folder: where to; what lies there stays.
        kind: as its class begins in Transformers: `Qwen3`.
        settings: of its configuration.
        dtype: of its weights.
        shard: the largest file.
        biases: their standard deviation; None leaves them as they are, mostly 0.
    """
    torch.manual_seed(0)
    config_kind = "Gemma3Text" if kind == "Gemma3" else kind
    classes = mimo if kind == "MiMo" else transformers
    config = getattr(classes, f"{config_kind}Config")(**settings)
    model = getattr(classes, f"{kind}ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if biases and name.endswith("bias"):
                value.normal_(0, biases)
    model.save_pretrained(folder, max_shard_size=shard)
    if settings.get("num_nextn_predict_layers"):
        add_mtp(folder, dtype)
    return folder


def add_mtp(folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Add a layer of random weights that predicts a further token to a model's files."""
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    for name, shape in mtp_files.shapes(config).items():
        value = torch.randn(shape) * 0.5 if name.endswith("bias") else torch.randn(shape) * 0.15
        weights[name] = (value + name.endswith("norm.weight")).to(dtype)
    if config["model_type"] != "mimo":
        prefix = mtp_files.prefix_of(config)
        weights[f"{prefix}embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
        weights[f"{prefix}shared_head.head.weight"] = weights["lm_head.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def with_tiny_tokenizer(folder: Path) -> Path:
    """Copy the tiny model's tokenizer into a folder; returns the folder."""
    for file in MODEL_DIR.iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)
    return folder


def make_model(
    folder: Path, family: str, *, dtype: torch.dtype = torch.float32, **further: Any
) -> Path:
    """Write a model of a family whose special parts all matter: a directory to start from."""
    kind = family.partition(",")[0]
    random_model(folder, kind, COMMON | FAMILIES[family] | further, dtype=dtype, biases=0.5)
    return with_tiny_tokenizer(folder)


def mixture_of_experts(folder: Path, **further: Any) -> Path:
    """Write a Qwen3-MoE, with the tiny model's tokenizer; further settings of its own."""
    settings = COMMON | EXPERTS | {
        "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1,
        "head_dim": 32, "norm_topk_prob": True, "initializer_range": 0.3, "bos_token_id": None,
    }  # fmt: skip
    return with_tiny_tokenizer(random_model(folder, "Qwen3Moe", settings | further))


def save(
    folder: Path,
    made: PreTrainedTokenizerFast,
    *,
    eos: str = "<|im_end|>",
    vocabulary: int | None = None,
    eos_token_id: int | None = 2,
    context: int = 256,
) -> Path:
    """Save a tokenizer with a random Qwen2 of two layers; returns the folder.

    Args:
        folder: where to.
        made: what `tokenizer` made.
        eos: the tokenizer's end-of-sequence token, which stays as special as it is.
        vocabulary: rows of the embedding; None takes as many as there are tokens.
        eos_token_id: the one that config.json names; generation_config.json names none.
        context: the longest prompt plus response, in tokens.
    """
    made.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": eos}))
    own = {
        "vocab_size": vocabulary or len(made),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": context,
        "initializer_range": 0.2,
        "eos_token_id": eos_token_id,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    random_model(folder, "Qwen2", COMMON | own)
    (folder / "generation_config.json").write_text("{}")
    return folder


def hollow(
    folder: Path,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    *,
    vocabulary: int = 151_936,
) -> Path:
    """Files of a Qwen3 whose weights are a hole in a file: it can be planned for, and no more."""
    size, kv = 128, 8
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        parts = {
            "self_attn.q_proj": (heads * size, hidden),
            "self_attn.k_proj": (kv * size, hidden),
            "self_attn.v_proj": (kv * size, hidden),
            "self_attn.o_proj": (hidden, heads * size),
            "self_attn.q_norm": (size,),
            "self_attn.k_norm": (size,),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "mlp.down_proj": (hidden, intermediate),
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    shapes["model.norm.weight"] = (hidden,)
    header, place = {}, 0
    for name, shape in shapes.items():
        end = place + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, end]}
        place = end
    text = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + place)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "vocab_size": vocabulary,
        "max_position_embeddings": 40_960,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder
