"""nanochat as its code has it since 14 March 2026, for Transformers.

Beyond Transformers' NanoChat (https://github.com/karpathy/nanochat, commits a825e63 to 92d63d4):

    smear     each token's normed embedding gets some of the one before it, by a gate of its own
    scalars   before each layer the stream is x <- a x + b e, with e the smeared embedding
    values    of every other layer, the last one included, get an embedding of the token, by a gate
              for each head
    q and k   are made longer after their norms
    windows   in some layers
    backout   the output of the layer in the middle is taken away, in part, from the last one

This file needs torch and Transformers alone: directories that `kit import nanochat` writes have a
copy, so that `from_pretrained(path, trust_remote_code=True)` loads them anywhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers import initialization as init
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.nanochat.configuration_nanochat import NanoChatConfig
from transformers.models.nanochat.modeling_nanochat import (
    NanoChatMLP,
    NanoChatPreTrainedModel,
    NanoChatRMSNorm,
    NanoChatRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)

TYPE = "nanochat_2026"


@strict
class NanoChat2026Config(NanoChatConfig):
    """NanoChat's configuration, and what this version has more."""

    model_type = TYPE

    sliding_window: int | None = None
    """Tokens that a layer with a window sees, the token itself included."""
    layer_types: list[str] | None = None
    """`sliding_attention` or `full_attention`, layer by layer; None has no windows."""
    smear_channels: int = 24
    """Channels that the gate of the embedding before reads."""
    value_channels: int = 12
    """Channels that the gates of the value embeddings read."""
    value_range: float = 3.0
    """Largest value of these gates."""
    query_key_factor: float = 1.2
    """Of normed queries, and of normed keys."""

    def has_values(self, layer: int) -> bool:
        """Whether a layer has value embeddings."""
        return bool(layer % 2 == (self.num_hidden_layers - 1) % 2)

    def window(self, layer: int) -> int | None:
        """Window of a layer; None where it sees everything."""
        kinds = self.layer_types or ()
        return self.sliding_window if kinds and kinds[layer] == "sliding_attention" else None


class Attention(nn.Module):
    """Grouped queries, rotated, normed and made longer; values with an embedding."""

    def __init__(self, config: NanoChat2026Config, layer_idx: int) -> None:
        super().__init__()
        heads, groups = config.num_attention_heads, config.num_key_value_heads or 1
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.hidden_size // heads
        self.num_key_value_groups = heads // groups
        self.scaling = config.query_key_factor**2 * self.head_dim**-0.5
        self.is_causal, self.attention_dropout = True, config.attention_dropout
        self.sliding_window = config.window(layer_idx)
        wide, narrow = heads * self.head_dim, groups * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, wide, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=False)
        self.o_proj = nn.Linear(wide, config.hidden_size, bias=False)
        self.ve_gate = None
        if config.has_values(layer_idx):
            self.ve_gate = nn.Linear(config.value_channels, groups, bias=False)
        self.norm = NanoChatRMSNorm(eps=config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        values: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Output for each token, (B, T, hidden size); `values` are embeddings, (B, T, keys)."""
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (part(x).view(shape) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.ve_gate is not None and values is not None:
            gate = torch.sigmoid(self.ve_gate(x[..., : self.config.value_channels]))
            v = v + self.config.value_range * gate[..., None] * values.view(shape)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        q, k = self.norm(q), self.norm(k)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        out, _ = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        output: torch.Tensor = self.o_proj(out.reshape(*x.shape[:-1], -1))
        return output


class Layer(GradientCheckpointingLayer):
    """Attention and feed-forward part, each added to what went into its norm."""

    def __init__(self, config: NanoChat2026Config, layer_idx: int) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer_idx)
        self.mlp = NanoChatMLP(config)
        self.norm = NanoChatRMSNorm(eps=config.rms_norm_eps)

    def forward(
        self, x: torch.Tensor, values: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        """Output for each token, (B, T, hidden size)."""
        x = x + self.self_attn(self.norm(x), values, **kwargs)
        output: torch.Tensor = x + self.mlp(self.norm(x))
        return output


class NanoChat2026PreTrainedModel(NanoChatPreTrainedModel):
    """What both classes below tell Transformers."""

    config_class = NanoChat2026Config
    _no_split_modules = ["Layer"]  # noqa: RUF012 - Transformers' form
    _can_record_outputs = {"hidden_states": Layer, "attentions": Attention}  # noqa: RUF012
    _supports_flash_attn = _supports_sdpa = _supports_flex_attn = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, NanoChat2026Model):
            init.ones_(module.resid_lambdas)
            for scalar in (module.x0_lambdas, module.smear_lambda, module.backout_lambda):
                init.zeros_(scalar)


class NanoChat2026Model(NanoChat2026PreTrainedModel):
    """Everything but the output layer."""

    takes_rows_before = True
    """Says to who calls it with several texts in one row that it needs `rows_before`."""

    def __init__(self, config: NanoChat2026Config) -> None:
        super().__init__(config)
        layers, size = config.num_hidden_layers, config.hidden_size
        keys = size // config.num_attention_heads * (config.num_key_value_heads or 1)
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.layers = nn.ModuleList(Layer(config, number) for number in range(layers))
        self.value_embeds = nn.ModuleDict(
            {
                str(number): nn.Embedding(config.vocab_size, keys)
                for number in range(layers)
                if config.has_values(number)
            }
        )
        self.resid_lambdas = nn.Parameter(torch.ones(layers))
        self.x0_lambdas = nn.Parameter(torch.zeros(layers))
        self.smear_gate = nn.Linear(config.smear_channels, 1, bias=False)
        self.smear_lambda = nn.Parameter(torch.zeros(1))
        self.backout_lambda = nn.Parameter(torch.zeros(1))
        self.norm = NanoChatRMSNorm(eps=config.rms_norm_eps)
        self.rotary_emb = NanoChatRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    def smeared(
        self, x: torch.Tensor, before: torch.Tensor, position_ids: torch.Tensor
    ) -> torch.Tensor:
        """Embeddings with some of the one before; the first of a text has none."""
        gate = self.smear_lambda.to(x.dtype) * torch.sigmoid(
            self.smear_gate(x[..., : self.config.smear_channels])
        )
        return x + gate * before * (position_ids > 0)[..., None].to(x.dtype)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        rows_before: Callable[[torch.Tensor], torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Output of the last layer.

        `rows_before` gives the rows (T, D) that stand before each of T rows, where these are not in
        the order of one text.
        """
        x = self.norm(self.embed_tokens(input_ids))
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        if position_ids is None:
            position_ids = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        if rows_before is None:
            last = getattr(past_key_values, "last_embedding", None) if seen else None
            first = torch.zeros_like(x[:, :1]) if last is None else last
            before = torch.cat((first, x[:, :-1]), dim=1)
        else:
            before = rows_before(x[0])[None]
        if past_key_values is not None:
            past_key_values.last_embedding = x[:, -1:]
        own = {"position_embeddings": self.rotary_emb(x, position_ids=position_ids)}
        about = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "past_key_values": past_key_values,
            "position_ids": position_ids,
        }
        masks = {None: create_causal_mask(**about)}
        if self.config.sliding_window is not None:
            masks[self.config.sliding_window] = create_sliding_window_causal_mask(**about)
        x = start = self.smeared(x, before, position_ids)
        middle = x
        for number, layer in enumerate(self.layers):
            x = self.resid_lambdas[number] * x + self.x0_lambdas[number] * start
            values = None
            if self.config.has_values(number):
                values = self.value_embeds[str(number)](input_ids)
            mask = masks[self.config.window(number)]
            x = layer(
                x, values, attention_mask=mask, past_key_values=past_key_values, **own, **kwargs
            )
            if number == len(self.layers) // 2:
                middle = x
        x = self.norm(x - self.backout_lambda.to(x.dtype) * middle)
        return BaseModelOutputWithPast(last_hidden_state=x, past_key_values=past_key_values)


class NanoChat2026ForCausalLM(NanoChat2026PreTrainedModel, GenerationMixin):
    """The model with its output layer and the soft cap of its logits."""

    def __init__(self, config: NanoChat2026Config) -> None:
        super().__init__(config)
        self.model = NanoChat2026Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, (B, T, vocabulary), of all tokens or of the last `logits_to_keep`."""
        output = self.model(input_ids, **kwargs)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept, :])
        if cap := self.config.final_logit_softcapping:
            logits = cap * torch.tanh(logits / cap)
        return CausalLMOutputWithPast(logits=logits, past_key_values=output.past_key_values)


def register() -> None:
    """Have Transformers know this model by its `model_type`."""
    AutoConfig.register(TYPE, NanoChat2026Config, exist_ok=True)
    AutoModelForCausalLM.register(NanoChat2026Config, NanoChat2026ForCausalLM, exist_ok=True)
