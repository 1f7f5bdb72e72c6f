"""NanoChat for SGLang, with the weights and names of Transformers' `NanoChatForCausalLM`.

A decoder of the usual parts in an order of its own (https://github.com/karpathy/nanochat):

    embedding, norm, then layers of  x + attention(norm(x)),  x + mlp(norm(x)),  then norm, output
    attention   queries and keys are rotated first and normed then; the rotation is by minus the
                usual angle
    mlp         fc2(relu(fc1(x))^2)
    norms       root mean square, without weights
    output      a matrix of its own; logits z become c tanh(z / c), which SGLang's logits processor
                does by the configuration's `final_logit_softcapping`, once

Written of SGLang's layers only, so that tensor parallelism, the prefix cache, both CPU and GPU, and
quantised linear layers work as they do for SGLang's own models.

    relies on   layers/rotary_embedding/base.py: RotaryEmbedding._compute_inv_freq, of which all
                angles are made
                layers/logits_processor.py: LogitsProcessor, that it caps
                models/registry.py: EntryClass
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader
from sglang.srt.utils import add_prefix
from torch import nn

SHARDS = {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
"""Which part of the one projection for queries, keys and values a matrix of the files is."""


class ReverseRotation(RotaryEmbedding):
    """Rotary embedding by minus the usual angle."""

    def _compute_inv_freq(self, base: float) -> torch.Tensor:
        frequencies: torch.Tensor = super()._compute_inv_freq(base)
        return -frequencies


def norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """The root mean square norm over the last dimension, without weights."""
    return nn.functional.rms_norm(x.float(), x.shape[-1:], eps=eps).to(x.dtype)


def rotation_of(config: Any) -> ReverseRotation:
    """The rotation that all layers share."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ReverseRotation(
        size,
        size,
        config.max_position_embeddings,
        config.rope_parameters["rope_theta"],
        True,  # pairs lie half a head apart
        torch.get_default_dtype(),
    )


class NanoChatAttention(nn.Module):
    """Grouped queries, rotated and then normed."""

    def __init__(
        self, config: Any, layer: int, rotation: nn.Module, quant: Any, prefix: str
    ) -> None:
        super().__init__()
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.size, self.eps, self.rotation = size, config.rms_norm_eps, rotation
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            size,
            heads,
            config.num_key_value_heads,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=add_prefix("qkv_proj", prefix),
        )
        self.o_proj = RowParallelLinear(
            heads * size,
            config.hidden_size,
            bias=config.attention_bias,
            quant_config=quant,
            prefix=add_prefix("o_proj", prefix),
        )
        self.queries, self.keys = self.qkv_proj.num_heads, self.qkv_proj.num_kv_heads
        """Heads on this device."""
        self.attn = RadixAttention(
            self.queries,
            size,
            size**-0.5,
            num_kv_heads=self.keys,
            layer_id=layer,
            quant_config=quant,
            prefix=add_prefix("attn", prefix),
        )

    def values(self, v: torch.Tensor, x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """Values of each token; a version with embeddings of them adds those here."""
        return v

    def forward(
        self,
        positions: torch.Tensor,
        x: torch.Tensor,
        batch: Any,
        own: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output for each token, (T, hidden size).

        Args:
            positions: of each token in its text.
            x: normed input.
            batch: which tokens each may see.
            own: embeddings of values.
        """
        qkv, _ = self.qkv_proj(x)
        widths = [self.size * heads for heads in (self.queries, self.keys, self.keys)]
        q, k, v = qkv.split(widths, dim=-1)
        v = self.values(v, x, own)
        q, k = self.rotation(positions, q.contiguous(), k.contiguous())
        q, k = (norm(part.unflatten(-1, (-1, self.size)), self.eps).flatten(-2) for part in (q, k))
        output: torch.Tensor = self.o_proj(self.attn(q, k, v, batch))[0]
        return output


class NanoChatMLP(nn.Module):
    """Two matrices, and the square of the positive part between them."""

    def __init__(self, config: Any, quant: Any, prefix: str) -> None:
        super().__init__()
        self.fc1 = ColumnParallelLinear(
            config.hidden_size,
            config.intermediate_size,
            bias=False,
            quant_config=quant,
            prefix=add_prefix("fc1", prefix),
        )
        self.fc2 = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            bias=False,
            quant_config=quant,
            prefix=add_prefix("fc2", prefix),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Output for each token, (T, hidden size)."""
        inner = torch.relu(self.fc1(x)[0]).square()
        output: torch.Tensor = self.fc2(inner)[0]
        return output


class NanoChatLayer(nn.Module):
    """Attention and feed-forward part, each added to what went into its norm."""

    def __init__(
        self, config: Any, layer: int, rotation: nn.Module, quant: Any, prefix: str
    ) -> None:
        super().__init__()
        attention = add_prefix("self_attn", prefix)
        self.eps = config.rms_norm_eps
        self.self_attn = NanoChatAttention(config, layer, rotation, quant, attention)
        self.mlp = NanoChatMLP(config, quant, add_prefix("mlp", prefix))

    def forward(self, positions: torch.Tensor, x: torch.Tensor, batch: Any) -> torch.Tensor:
        """Output for each token, (T, hidden size)."""
        x = x + self.self_attn(positions, norm(x, self.eps), batch)
        output: torch.Tensor = x + self.mlp(norm(x, self.eps))
        return output


class NanoChatModel(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: Any, quant: Any, prefix: str) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=add_prefix("embed_tokens", prefix)
        )
        rotation = rotation_of(config)
        self.layers = nn.ModuleList(
            NanoChatLayer(config, number, rotation, quant, add_prefix(f"layers.{number}", prefix))
            for number in range(config.num_hidden_layers)
        )

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        batch: Any,
        embedded: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Output of the last layer, normed, (T, hidden size)."""
        x = norm(self.embed_tokens(tokens) if embedded is None else embedded, self.eps)
        for layer in self.layers:
            x = layer(positions, x, batch)
        return norm(x, self.eps)


class NanoChatForCausalLM(nn.Module):
    """NanoChat, by the names that SGLang calls a model by."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        if (kind := config.rope_parameters["rope_type"]) != "default":
            raise ValueError(f"NanoChat with rope scaling of type {kind!r} is not known.")
        if config.hidden_act != "relu2":
            raise ValueError(f"NanoChat with the activation {config.hidden_act!r} is not known.")
        self.config, self.quant_config = config, quant_config
        self.model = NanoChatModel(config, quant_config, add_prefix("model", prefix))
        self.lm_head = self.model.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=quant_config,
                prefix=add_prefix("lm_head", prefix),
            )
        self.logits_processor = LogitsProcessor(config)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        """SGLang's `LogitsProcessorOutput` for a batch."""
        hidden = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take weights by their names in Transformers' files; all, or some of them.

        Raises:
            KeyError: there is no such weight here.
        """
        load_by_name(self, weights, skipped=self.config.tie_word_embeddings)


def load_by_name(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, skipped: bool = False
) -> None:
    """Take weights by their names in Transformers' files.

    Args:
        model: whose parameters have these names, but for one projection of queries, keys, values.
        weights: all of them, or some.
        skipped: leave out the output layer, which is a copy of the embedding.

    Raises:
        KeyError: there is no such weight here.
    """
    own: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
    for name, value in weights:
        if name == "lm_head.weight" and skipped:
            continue
        path, _, kind = name.rpartition(".")
        parent, _, part = path.rpartition(".")
        if part in SHARDS:
            weight = own[f"{parent}.qkv_proj.{kind}"]
            weight.weight_loader(weight, value, SHARDS[part])
        else:
            weight = own[name]
            getattr(weight, "weight_loader", default_weight_loader)(weight, value)


EntryClass = NanoChatForCausalLM
