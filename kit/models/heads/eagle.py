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
from kit.models import attention
from kit.models.dropout import switch_off
from kit.models.heads.head import Head, HeadLayers, run_layer
from kit.models.packing import Packed
from kit.models.source import weight_files


class EagleLayers(HeadLayers):
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
