"""EAGLE-3 heads: one decoder layer on what several of a policy's layers put out.

Place i of a text has the outputs of three layers l_i, m_i and h_i, and the embedding of the token
that follows, x_{i+1}. With norms n of its own:

    g_i = fc [l_i, m_i, h_i],       u_i = [n(x_{i+1}), n(g_i)]
    a_i = g_i + attention(u)_i,     o_i = a_i + mlp(n(a_i))

n(o_i), by an output embedding of the head's own, says what token i + 2 is: one of the head's words,
which may be fewer than the policy's tokens. As a draft goes on, o_i stands for g_{i+1}. Embeddings
are the policy's. Li et al., https://arxiv.org/abs/2503.01840.

    relies on   SGLang's models/llama_eagle3.py: LlamaForCausalLMEagle3, which computes this
                Transformers' LlamaDecoderLayer, LlamaRotaryEmbedding, LlamaRMSNorm
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.errors import ModelError
from kit.models import attention
from kit.models.dropout import switch_off
from kit.models.heads import eagle3_files as files
from kit.models.heads.head import Head, HeadLayers
from kit.models.packing import Packed
from kit.models.source import weight_files
from kit.utils.reading import read_json


class Eagle3Layers(HeadLayers):
    """What a head has of its own, by the names that SGLang has for it."""

    def __init__(self, config: Any, reads: tuple[int, ...]) -> None:
        """`config`: a `LlamaConfig`; `reads`: layers of the policy."""
        from transformers.models.llama import modeling_llama as llama

        super().__init__()
        attention.register()
        config._attn_implementation = attention.NAME
        self.config, self.reads = config, reads
        width = config.hidden_size
        self.fc = nn.Linear(len(reads) * width, width, bias=False)
        layer: Any = llama.LlamaDecoderLayer(config, 0)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(layer.self_attn, name).out_features
            setattr(layer.self_attn, name, nn.Linear(2 * width, rows, bias=False))
        layer.hidden_norm = llama.LlamaRMSNorm(width, config.rms_norm_eps)
        self.layers = nn.ModuleList([layer])
        self.norm = llama.LlamaRMSNorm(width, config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.rotary_emb = llama.LlamaRotaryEmbedding(config)
        self._weight_conversions: list[Any] = []  # its names are those of its files

    def forward(
        self, before_E: torch.Tensor, embedded_E: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """See `HeadLayers`."""
        layer: Any = self.layers[0]
        read_E = torch.cat([layer.input_layernorm(embedded_E), layer.hidden_norm(before_E)], dim=-1)
        rows, places = read_E[None], packed.position_T[None]
        attended, _ = layer.self_attn(
            rows,
            position_embeddings=self.rotary_emb(rows, places),
            attention_mask=None,
            packed=attention.layout(packed, before_E.device),
        )
        stream_E = before_E + attended[0]
        out: torch.Tensor = stream_E + layer.mlp(layer.post_attention_layernorm(stream_E))
        return out

    def given(self, hidden_E: torch.Tensor) -> torch.Tensor:
        """See `HeadLayers`; `hidden_E` are outputs of the layers side by side."""
        made: torch.Tensor = self.fc(hidden_E)
        return made

    def said(self, out_R: torch.Tensor) -> torch.Tensor:
        """See `HeadLayers`."""
        normed: torch.Tensor = self.norm(out_R)
        return normed

    def output(self, _policys: torch.Tensor) -> torch.Tensor:
        """Its own output embedding, (words, hidden size)."""
        return self.lm_head.weight


def load(path: str | Path, model: str | Path) -> Head:
    """Load a head with float32 weights.

    Args:
        path: the head's directory.
        model: that of the model that it reads.

    Raises:
        ModelError: its files lack weights, or have others.
    """
    from transformers import LlamaConfig

    settings, policy = (read_json(Path(p) / "config.json", unique=False) for p in (path, model))
    config = LlamaConfig.from_pretrained(path, local_files_only=True)
    head = Eagle3Layers(config, files.layers_read(settings, policy)).float()
    found = _stored(path)
    words = found.pop(files.WORDS, None)
    found.pop(files.IS_WORD, None)
    found.pop(files.EMBEDDING, None)
    try:
        head.load_state_dict({name: value.float() for name, value in found.items()})
    except RuntimeError as error:
        raise ModelError(
            f"The EAGLE-3 head in {path} cannot be loaded.",
            why=str(error),
            fix="make one with `kit draft MODEL OUT --algorithm eagle3`.",
        ) from error
    if words is not None:
        head.words_D = words.long() + torch.arange(len(words))
    switch_off(head)
    return Head(head)


def word_tables(path: str | Path) -> dict[str, torch.Tensor]:
    """What a head's files say of its words, which no training changes; empty where all are."""
    found = _stored(path)
    return {name: found[name] for name in (files.WORDS, files.IS_WORD) if name in found}


def _stored(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a head's files, by the trainer's names."""
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for file in weight_files(Path(path)):
        found |= {files.own_name(name): value for name, value in load_file(file).items()}
    return found
