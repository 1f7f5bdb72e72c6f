"""EAGLE heads: one decoder layer on a policy's own hidden states, which drafts for it.

With h_i and x_{i+1} as in `kit.models.heads.head`:

    u_i = fc [x_{i+1}, h_i],   a_i = u_i + attention(u)_i,   o_i = a_i + mlp(norm(a_i))

Li et al., https://arxiv.org/abs/2401.15077.

    relies on   SGLang's models/llama_eagle.py: LlamaForCausalLMEagle, which computes and names this
                Transformers' LlamaDecoderLayer, LlamaRotaryEmbedding
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.errors import ModelError
from kit.models import attention, own
from kit.models.dropout import switch_off
from kit.models.heads.files import ARCHITECTURE
from kit.models.heads.head import Head, run_layer
from kit.models.packing import Packed
from kit.models.source import weight_files


class EagleLayers(nn.Module):
    """What a head has of its own, by the names of its files."""

    def __init__(self, config: Any) -> None:
        """`config`: a `LlamaConfig`."""
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        attention.register()
        config._attn_implementation = attention.NAME
        self.config = config
        self.fc = nn.Linear(2 * config.hidden_size, config.hidden_size)
        layer: Any = llama.LlamaDecoderLayer(config, 0)
        layer.input_layernorm = nn.Identity()
        self.layers = nn.ModuleList([layer])
        self.rotary_emb = llama.LlamaRotaryEmbedding(config)
        self._weight_conversions: list[Any] = []  # its names are those of its files

    def forward(
        self, before_E: torch.Tensor, embedded_E: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """See `HeadLayers`."""
        rows_E = self.fc(torch.cat([embedded_E, before_E], dim=-1))
        return run_layer(self.layers[0], self.rotary_emb, rows_E, packed)


def load(path: str | Path) -> Head:
    """Load a head with float32 weights.

    Raises:
        ModelError: its files lack weights, or have others.
    """
    from safetensors.torch import load_file
    from transformers import LlamaConfig

    head = EagleLayers(LlamaConfig.from_pretrained(path, local_files_only=True)).float()
    found: dict[str, torch.Tensor] = {}
    for file in weight_files(Path(path)):
        found |= load_file(file)
    try:
        head.load_state_dict({name: value.float() for name, value in found.items()})
    except RuntimeError as error:
        raise ModelError(
            f"The EAGLE head in {path} cannot be loaded.",
            why=str(error),
            fix="make one with `kit draft MODEL OUT --algorithm eagle`.",
        ) from error
    switch_off(head)
    return Head(head)


def make(model: str | Path, folder: str | Path, seed: int = 0) -> None:
    """Write a head for a model, which has learned nothing, and the model's tokenizer.

    Its matrices begin as https://proceedings.mlr.press/v9/glorot10a.html has them.

    Args:
        model: directory of the model.
        folder: a directory for the head; it is there.
        seed: of its first weights.
    """
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoTokenizer, LlamaConfig

    own.register(model)
    policy = AutoConfig.from_pretrained(model, local_files_only=True)
    config = LlamaConfig(
        architectures=[ARCHITECTURE],
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
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        head = EagleLayers(config)
        for name, value in head.named_parameters():
            if value.ndim == 2:
                nn.init.xavier_uniform_(value)
            elif "norm" not in name:
                nn.init.zeros_(value)
    save_file(
        {name: value.contiguous() for name, value in head.state_dict().items()},
        Path(folder) / "model.safetensors",
        {"format": "pt"},
    )
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model, local_files_only=True).save_pretrained(folder)
