"""nanochat as its code has it since 14 March 2026, for SGLang; `kit.models.own.nanochat_2026` says
what it computes, and its weights have the names of that class.

Each token takes some of the embedding of the one before it, which may have come in an earlier
forward pass, or lie in the prefix cache of another request. So the token of each place of the KV
cache is kept: the place before a token is known wherever attention is, and with it what stands
there. Drafts lie in no such order, and are refused.

    relies on   model_executor/forward_context.py: get_req_to_token_pool, get_token_to_kv_pool
                model_executor/forward_batch_info.py: out_cache_loc, req_pool_indices,
                extend_seq_lens
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_context import get_req_to_token_pool, get_token_to_kv_pool
from sglang.srt.runtime_context import get_parallel
from sglang.srt.utils import add_prefix
from torch import nn

from kit.engine.models.nanochat import (
    NanoChatAttention,
    NanoChatMLP,
    load_by_name,
    norm,
    rotation_of,
)


class TokensInCache:
    """The token at each place of the KV cache."""

    def __init__(self) -> None:
        """Have none yet: how large the cache is shows in the first forward pass."""
        self._tokens: torch.Tensor | None = None

    def before(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        """Keep a batch's tokens; the token before each, (T). At position 0 it may be any."""
        mode = batch.forward_mode
        if not (mode.is_decode_or_idle() or mode.is_extend_without_speculative()):
            raise ValueError("This nanochat takes no drafts: each token needs the one before it.")
        if self._tokens is None:
            pool = get_token_to_kv_pool()
            places = pool.size + pool.page_size
            self._tokens = torch.zeros(places, dtype=torch.long, device=tokens.device)
        self._tokens[batch.out_cache_loc] = tokens.long()
        requests = batch.req_pool_indices
        if not mode.is_decode_or_idle():
            requests = requests.repeat_interleave(batch.extend_seq_lens)
        table = get_req_to_token_pool().req_to_token
        found: torch.Tensor = self._tokens[table[requests, (positions - 1).clamp(min=0)].long()]
        return found


class WholeWeight(nn.Module):
    """A weight of which this device computes with the rows or columns of its own heads."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape), requires_grad=False)


def _scalars(count: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(count), requires_grad=False)


def own_heads(heads: int) -> slice:
    """Heads of keys and values that are this device's."""
    parallel = get_parallel()
    if heads < parallel.tp_size:  # several devices have the same one
        first = parallel.tp_rank * heads // parallel.tp_size
        return slice(first, first + 1)
    share = heads // parallel.tp_size
    return slice(parallel.tp_rank * share, (parallel.tp_rank + 1) * share)


class Attention(NanoChatAttention):
    """NanoChat's, with longer queries and keys, windows, and embeddings of values."""

    def __init__(
        self, config: Any, layer: int, rotation: nn.Module, quant: Any, prefix: str
    ) -> None:
        super().__init__(config, layer, rotation, quant, prefix)
        self.heads, self.range = own_heads(config.num_key_value_heads), config.value_range
        window = config.window(layer)
        self.attn = RadixAttention(
            self.queries,
            self.size,
            config.query_key_factor**2 * self.size**-0.5,
            num_kv_heads=self.keys,
            layer_id=layer,
            sliding_window_size=-1 if window is None else window - 1,
            quant_config=quant,
            prefix=add_prefix("attn", prefix),
        )
        if config.has_values(layer):
            self.ve_gate = WholeWeight(config.num_key_value_heads, config.value_channels)

    def values(self, v: torch.Tensor, x: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
        """Values with some of a token's own, (T, keys of all devices), by each head's gate."""
        if own is None:
            return v
        weight = self.ve_gate.weight[self.heads]
        gate = self.range * torch.sigmoid(x[:, : weight.shape[1]] @ weight.T)
        added = gate[..., None] * own.unflatten(-1, (-1, self.size))[:, self.heads]
        total: torch.Tensor = v + added.flatten(-2)
        return total


class Layer(nn.Module):
    """Attention and feed-forward part, each added to what went into its norm."""

    def __init__(
        self, config: Any, layer: int, rotation: nn.Module, quant: Any, prefix: str
    ) -> None:
        super().__init__()
        attention = add_prefix("self_attn", prefix)
        self.eps = config.rms_norm_eps
        self.self_attn = Attention(config, layer, rotation, quant, attention)
        self.mlp = NanoChatMLP(config, quant, add_prefix("mlp", prefix))

    def forward(
        self, positions: torch.Tensor, x: torch.Tensor, batch: Any, own: torch.Tensor | None
    ) -> torch.Tensor:
        """Output for each token, (T, hidden size)."""
        x = x + self.self_attn(positions, norm(x, self.eps), batch, own)
        output: torch.Tensor = x + self.mlp(norm(x, self.eps))
        return output


class NanoChat2026Model(nn.Module):
    """Everything but the output layer."""

    def __init__(self, config: Any, quant: Any, prefix: str) -> None:
        super().__init__()
        layers, heads = config.num_hidden_layers, config.num_key_value_heads
        keys = config.hidden_size // config.num_attention_heads * heads
        self.config, self.eps, self.tokens = config, config.rms_norm_eps, TokensInCache()
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size, config.hidden_size, prefix=add_prefix("embed_tokens", prefix)
        )
        rotation = rotation_of(config)
        self.layers = nn.ModuleList(
            Layer(config, number, rotation, quant, add_prefix(f"layers.{number}", prefix))
            for number in range(layers)
        )
        self.value_embeds = nn.ModuleDict(
            {
                str(number): WholeWeight(config.vocab_size, keys)
                for number in range(layers)
                if config.has_values(number)
            }
        )
        self.smear_gate = WholeWeight(1, config.smear_channels)
        self.resid_lambdas, self.x0_lambdas = _scalars(layers), _scalars(layers)
        self.smear_lambda, self.backout_lambda = _scalars(1), _scalars(1)

    def embedded(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        """Normed embeddings with some of the one before, (T, hidden size)."""
        before = self.tokens.before(tokens, positions, batch)
        x, last = (norm(self.embed_tokens(ids), self.eps) for ids in (tokens, before))
        weight = self.smear_gate.weight
        gate = self.smear_lambda * torch.sigmoid(x[:, : weight.shape[1]] @ weight.T)
        return x + gate * last * (positions > 0)[:, None].to(x.dtype)

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, batch: Any) -> torch.Tensor:
        """Output of the last layer, normed, (T, hidden size)."""
        x = middle = start = self.embedded(tokens, positions, batch)
        for number, layer in enumerate(self.layers):
            x = self.resid_lambdas[number] * x + self.x0_lambdas[number] * start
            own = None
            if str(number) in self.value_embeds:
                table: Any = self.value_embeds[str(number)]
                own = table.weight[tokens]
            x = layer(positions, x, batch, own)
            if number == len(self.layers) // 2:
                middle = x
        return norm(x - self.backout_lambda * middle, self.eps)


class NanoChat2026ForCausalLM(nn.Module):
    """This nanochat, by the names that SGLang calls a model by."""

    def __init__(self, config: Any, quant_config: Any = None, prefix: str = "") -> None:
        super().__init__()
        self.config, self.quant_config = config, quant_config
        self.model = NanoChat2026Model(config, quant_config, add_prefix("model", prefix))
        self.lm_head = ParallelLMHead(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=add_prefix("lm_head", prefix),
        )
        self.logits_processor = LogitsProcessor(config)

    def get_attention_sliding_window_size(self) -> int | None:
        """Tokens that a layer with a window sees before a token; None without windows."""
        windows = [self.config.window(n) for n in range(self.config.num_hidden_layers)]
        return max((w - 1 for w in windows if w is not None), default=None)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: Any,
        input_embeds: torch.Tensor | None = None,
    ) -> Any:
        """SGLang's `LogitsProcessorOutput` for a batch.

        Raises:
            ValueError: embeddings are given, or a draft is to be checked.
        """
        if input_embeds is not None:
            raise ValueError("This nanochat takes tokens: their values have embeddings too.")
        hidden = self.model(input_ids, positions, forward_batch)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take weights by the names of their files; all, or some of them.

        Raises:
            KeyError: there is no such weight here.
        """
        load_by_name(self, weights)


EntryClass = NanoChat2026ForCausalLM
