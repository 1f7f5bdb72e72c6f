"""A model's own layer that predicts a further token (multi-token prediction), as a head.

With h_i and x_{i+1} as in `kit.models.heads.head`, and norms n of its own:

    u_i = W [n(h_i), n(x_{i+1})],   o_i = n(layer(u)_i)

The layer is one as the model's others. GLM-4.5 has the two in the other order. At the first place
of a text, i = 0, MiMo takes x_1 for 0, as SGLang does. https://arxiv.org/abs/2505.07608 has MiMo,
https://arxiv.org/abs/2508.06471 GLM-4.5, and https://arxiv.org/abs/2412.19437 the idea; one layer
that drafts several tokens reads its own output, as an EAGLE head does.

    relies on   SGLang's models/mimo_mtp.py: MiMoMTP; models/glm4_moe_nextn.py:
                Glm4MoeForCausalLMNextN, which compute this
                Transformers' Qwen2DecoderLayer, Qwen2RMSNorm, Qwen2RotaryEmbedding, and those of
                Glm4Moe; get_checkpoint_conversion_mapping
"""

from __future__ import annotations

import re
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
from kit.models.source import copied_by, mtp_weights


class MtpLayers(HeadLayers):
    """One layer as a model's others and what is around it, by the names in the model's files."""

    def __init__(self, config: Any, rotary: nn.Module) -> None:
        """`config`: the model's; `rotary`: makes cosines and sines of places."""
        super().__init__()
        attention.register()
        config._attn_implementation = attention.NAME
        self.config, self.rotary_emb = config, rotary
        self._weight_conversions: list[Any] = []  # its names are those of the files


class MiMoLayers(MtpLayers):
    """MiMo's."""

    def __init__(self, config: Any) -> None:
        from transformers.models.qwen2 import modeling_qwen2 as qwen2

        super().__init__(config, qwen2.Qwen2RotaryEmbedding(config))
        layer: Any = qwen2.Qwen2DecoderLayer(config, 0)
        for name in ("token_layernorm", "hidden_layernorm", "final_layernorm"):
            layer.add_module(name, qwen2.Qwen2RMSNorm(config.hidden_size, config.rms_norm_eps))
        layer.input_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.model = nn.Module()
        self.model.mtp_layers = nn.ModuleList([layer])

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


class Glm4MoeLayers(MtpLayers):
    """GLM-4.5's, with experts."""

    def __init__(self, config: Any) -> None:
        from transformers.conversion_mapping import get_checkpoint_conversion_mapping
        from transformers.models.glm4_moe import modeling_glm4_moe as glm

        super().__init__(config, glm.Glm4MoeRotaryEmbedding(config))
        self.number, width = config.num_hidden_layers, config.hidden_size
        layer: Any = glm.Glm4MoeDecoderLayer(config, self.number)
        for name in ("enorm", "hnorm"):
            layer.add_module(name, glm.Glm4MoeRMSNorm(width, config.rms_norm_eps))
        layer.eh_proj = nn.Linear(2 * width, width, bias=False)
        layer.shared_head = nn.Module()
        layer.shared_head.norm = glm.Glm4MoeRMSNorm(width, config.rms_norm_eps)
        self.model = nn.Module()
        self.model.layers = nn.ModuleDict({str(self.number): layer})
        self._weight_conversions = get_checkpoint_conversion_mapping(config.model_type)

    def forward(
        self, before_E: torch.Tensor, embedded_E: torch.Tensor, packed: Packed
    ) -> torch.Tensor:
        """See `HeadLayers`."""
        layer: Any = self.model.get_submodule(f"layers.{self.number}")
        parts = layer.enorm(embedded_E), layer.hnorm(before_E)
        rows_E = layer.eh_proj(torch.cat(parts, dim=-1))
        out: torch.Tensor = layer.shared_head.norm(
            run_layer(layer, self.rotary_emb, rows_E, packed)
        )
        return out


LAYERS = {"MiMoForCausalLM": MiMoLayers, "Glm4MoeForCausalLM": Glm4MoeLayers}
"""What computes the layer, by the architecture of the model."""


def with_experts_together(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights as Transformers holds them: all experts of a layer in one tensor."""
    found, experts = {}, dict[str, dict[int, dict[str, torch.Tensor]]]()
    for name, value in named.items():
        if (match := _EXPERT.match(name)) is None:
            found[name] = value
        else:
            experts.setdefault(match[1], {}).setdefault(int(match[2]), {})[match[3]] = value
    for prefix, by_number in experts.items():
        each = [by_number[number] for number in sorted(by_number)]
        halves = [torch.cat([one["gate"], one["up"]]) for one in each]
        found[f"{prefix}.gate_up_proj"] = torch.stack(halves)
        found[f"{prefix}.down_proj"] = torch.stack([one["down"] for one in each])
    return found


_EXPERT = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def load(path: str | Path) -> Head:
    """Load a model's layer that predicts a further token, with float32 weights.

    Raises:
        ModelError: the model's files lack weights of it, or have others.
    """
    from transformers import AutoConfig

    own.register(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    head = LAYERS[config.architectures[0]](config).float()
    named = {name: value.float() for name, value in read(path) if not copied_by(name)}
    try:
        head.load_state_dict(with_experts_together(named))
    except (RuntimeError, LookupError) as error:
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
