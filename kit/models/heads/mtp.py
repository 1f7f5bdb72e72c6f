"""A model's own layer that predicts a further token (multi-token prediction), as a head.

With h_i and x_{i+1} as in `kit.models.heads.head`, and norms n of its own:

    u_i = W [n(h_i), n(x_{i+1})],   o_i = n(layer(u)_i)

The layer is one as the model's others. At the first place of a text, i = 0, x_1 is taken for 0, as
SGLang does. https://arxiv.org/abs/2505.07608 has MiMo, and https://arxiv.org/abs/2412.19437 the
idea; one layer that drafts several tokens reads its own output, as an EAGLE head does.

    relies on   SGLang's models/mimo_mtp.py: MiMoMTP, which computes this
                Transformers' Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.errors import ModelError
from kit.models import attention, own
from kit.models.dropout import switch_off
from kit.models.heads.head import Head, HeadLayers, run_layer
from kit.models.packing import Packed
from kit.models.source import mtp_weights

NORMS = ("token_layernorm", "hidden_layernorm", "final_layernorm")


class MtpLayers(HeadLayers):
    """MiMo's layer, by the names that it has in the model's files."""

    def __init__(self, config: Any) -> None:
        """`config`: MiMo's."""
        from transformers.models.qwen2 import modeling_qwen2 as qwen2

        super().__init__()
        attention.register()
        config._attn_implementation = attention.NAME
        self.config = config
        layer: Any = qwen2.Qwen2DecoderLayer(config, 0)
        for name in NORMS:
            layer.add_module(name, qwen2.Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))
        layer.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.model = nn.Module()
        self.model.mtp_layers = nn.ModuleList([layer])
        self.rotary_emb = qwen2.Qwen2RotaryEmbedding(config)
        self._weight_conversions: list[Any] = []  # its names are those of the files

    def forward(
        self, before_E: torch.Tensor, embedded_E: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """See `HeadLayers`."""
        layer: Any = self.model.get_submodule("mtp_layers.0")
        embedded_E = embedded_E.masked_fill(packed.position_T[:, None] == 0, 0)
        parts = layer.hidden_layernorm(before_E), layer.token_layernorm(embedded_E)
        rows_E = layer.input_proj(torch.cat(parts, dim=-1))
        out: torch.Tensor = layer.final_layernorm(run_layer(layer, self.rotary_emb, rows_E, packed))
        return out


def load(path: str | Path) -> Head:
    """Load a model's layer that predicts a further token, with float32 weights.

    Raises:
        ModelError: the model's files lack weights of it, or have others.
    """
    from transformers import AutoConfig

    own.register(path)
    head = MtpLayers(AutoConfig.from_pretrained(path, local_files_only=True)).float()
    try:
        head.load_state_dict({name: value.float() for name, value in read(path)})
    except RuntimeError as error:
        raise ModelError(
            f"The layer of {path} that predicts a further token cannot be loaded.",
            why=str(error),
            fix="download or copy the model again, or leave engine.speculative out.",
        ) from error
    switch_off(head)
    return Head(head)


def read(path: str | Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights of a model's layers that predict further tokens, as its files have them."""
    from safetensors import safe_open

    for file, names in groupby(mtp_weights(Path(path)).items(), key=lambda item: item[1]):
        with safe_open(file, "pt") as opened:
            for name, _ in names:
                yield name, opened.get_tensor(name)
