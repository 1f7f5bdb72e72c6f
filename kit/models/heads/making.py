"""Heads that have learned nothing yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from kit.errors import ConfigError
from kit.models import own
from kit.models.heads import eagle3_files, files
from kit.models.heads.eagle import EagleLayers
from kit.models.heads.eagle3 import Eagle3Layers
from kit.models.heads.head import HeadLayers
from kit.models.source import EMBEDDING, OUTPUT, stored_shapes, weight_files


def make(
    kind: Literal["eagle", "eagle3"], model: str | Path, folder: str | Path, seed: int = 0
) -> None:
    """Write a head for a model, which has learned nothing, and the model's tokenizer.

    Its matrices begin as https://proceedings.mlr.press/v9/glorot10a.html has them; the output
    embedding of an EAGLE-3 head, whose words are all of the model's tokens, as the model's.

    Args:
        kind: of the head.
        model: directory of the model.
        folder: a directory for the head; it is there.
        seed: of its first weights.

    Raises:
        ConfigError: the model has too few layers for this kind of head.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer

    own.register(model)
    policy = AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head, config = _eagle3(policy) if kind == "eagle3" else _eagle(policy)
        for name, value in head.named_parameters():
            if value.ndim == 2:
                nn.init.xavier_uniform_(value)
            elif "norm" not in name:
                nn.init.zeros_(value)
    weights = {name: value.contiguous() for name, value in head.state_dict().items()}
    if kind == "eagle3":
        weights[OUTPUT] = _output_embedding(Path(model)).float()
    save_file(weights, Path(folder) / "model.safetensors", {"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(folder)


def _eagle(policy: Any) -> tuple[HeadLayers, Any]:
    config = _config(policy, files.ARCHITECTURE)
    return EagleLayers(config), config


def _eagle3(policy: Any) -> tuple[HeadLayers, Any]:
    count = int(policy.num_hidden_layers)
    if count <= eagle3_files.READS:
        raise ConfigError(
            f"The model has {count} layers, and an EAGLE-3 head reads {eagle3_files.READS} before "
            "the last.",
            fix="take algorithm eagle, or standalone.",
        )
    read = eagle3_files.usual_layers(count)
    if len(set(read)) < len(read) or min(read) < 0:  # a small model: evenly from first to last
        read = (0, (count - 2) // 2, count - 2)
    more = {"eagle_aux_hidden_state_layer_ids": list(read), "use_aux_hidden_state": True}
    config = _config(
        policy,
        eagle3_files.ARCHITECTURE,
        draft_vocab_size=policy.vocab_size,
        eagle_config=more,
    )
    return Eagle3Layers(config, read), config


def _config(policy: Any, architecture: str, **more: Any) -> Any:
    """Configuration of a head with the sizes of a policy."""
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=[architecture],
        vocab_size=policy.vocab_size,
        hidden_size=policy.hidden_size,
        intermediate_size=policy.intermediate_size,
        num_hidden_layers=1,
        num_attention_heads=policy.num_attention_heads,
        num_key_value_heads=policy.num_key_value_heads,
        head_dim=getattr(policy, "head_dim", None),
        rms_norm_eps=policy.rms_norm_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": policy.rope_parameters["rope_theta"],
        },
        max_position_embeddings=policy.max_position_embeddings,
        bos_token_id=policy.bos_token_id,
        eos_token_id=policy.eos_token_id,
        pad_token_id=policy.pad_token_id,
        dtype="float32",
        **more,
    )


def _output_embedding(model: Path) -> torch.Tensor:
    """The output embedding in a model's files, which may be its input embedding."""
    from safetensors import safe_open

    wanted = OUTPUT if OUTPUT in stored_shapes(model) else EMBEDDING
    for file in weight_files(model):
        with safe_open(file, "pt") as opened:
            if wanted in opened.keys():  # noqa: SIM118 - it is no mapping
                found: torch.Tensor = opened.get_tensor(wanted)
                return found
    raise ValueError(f"{model} has no {wanted}")
