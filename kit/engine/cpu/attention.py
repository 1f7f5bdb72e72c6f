"""Attention for SGLang on a CPU: the whole batch in one call per layer.

SGLang's own `torch_native` backend attends request by request in Python, and knows neither soft
caps nor sinks. Here the keys and values of all requests are gathered from the cache into one padded
tensor, and one call attends for all (in decoding, where torch's attention is slow, two products).
Which cache slots, and who may see whom, is worked out once a step and shared by all layers that see
as far: everything so far, or the last tokens within a window.

Shapes: B requests, Q new tokens a request (1 in decode), K tokens seen at most, H key/value heads,
D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

from kit.operators.scores import shares

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner


PADDED_SCORES = 1 << 22
"""Requests are attended in slices so that one slice has at most this many scores a head."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Requests that are attended together."""

    query_rows: torch.Tensor
    """Row of the packed query of each padded place, (B, Q)."""
    is_query: torch.Tensor | None
    """False where a place is padding, (B, Q); None where none is."""
    cache_slots: torch.Tensor
    """Cache slot of each token seen, (B, K). Past a request's end its last slot stands in: finite
    values that the mask hides."""
    visible: torch.Tensor
    """Which token each query sees, (B, 1, Q, K)."""


@dataclass(frozen=True, slots=True)
class DecodeSlice:
    """Requests that are attended together, one new token each."""

    requests: slice
    cache_rows: torch.Tensor
    """Row of each token seen, (B * H * K), in a cache with a row for each slot and head."""
    hidden: torch.Tensor
    """0 for a token that the request sees, else -inf, (B * H, 1, K)."""


def decode_plan(
    req_to_token: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    heads: int,
    window: int = 0,
) -> list[DecodeSlice]:
    """Lay out one decoding step.

    Args:
        req_to_token: as for `plan`.
        rows: as for `plan`.
        seq_lens: as for `plan`.
        heads: key/value heads.
        window: a token sees so many, itself included; 0 is all before it.
    """
    longest = int(seq_lens.max())
    size = max(1, PADDED_SCORES // min(longest, window or longest))
    slices = []
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        lens = seq_lens[part, None]
        width = int(lens.max())
        begin = (lens - window).clamp(min=0) if window else torch.zeros_like(lens)
        seen = begin + torch.arange(min(width, window or width))
        slots = req_to_token[rows[part, None], torch.minimum(seen, lens - 1)].long()
        cache_rows = slots[:, None] * heads + torch.arange(heads)[:, None]
        hidden = torch.zeros(slots.shape).masked_fill_(seen >= lens, -torch.inf)
        hidden = hidden.repeat_interleave(heads, dim=0)[:, None]
        slices.append(DecodeSlice(part, cache_rows.flatten(), hidden))
    return slices


def plan(
    req_to_token: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor, new: torch.Tensor
) -> list[Slice]:
    """Lay out one forward pass.

    Args:
        req_to_token: cache slot of each token of each request, (rows, longest).
        rows: row of each request in it, (B,).
        seq_lens: tokens of each request, the new ones included, (B,).
        new: new tokens of each request, (B,); their queries are packed in this order.
    """
    starts = new.cumsum(0) - new
    longest_new, longest = int(new.max()), int(seq_lens.max())
    size = max(1, PADDED_SCORES // (longest_new * longest))
    slices = []
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        lens, count = seq_lens[part, None], new[part, None]
        place = torch.arange(int(count.max()))[None]
        seen = torch.arange(int(lens.max()))[None]
        position = lens - count + place
        is_query = place < count
        slices.append(
            Slice(
                query_rows=starts[part, None] + torch.minimum(place, count - 1),
                is_query=None if bool(is_query.all()) else is_query,
                cache_slots=req_to_token[rows[part, None], torch.minimum(seen, lens - 1)].long(),
                visible=(seen[:, None, :] <= position[:, :, None])[:, None],
            )
        )
    return slices


def within_window(planned: list[Slice], window: int) -> list[Slice]:
    """A plan whose queries see, of what they saw, themselves and the `window` - 1 before them.

    Args:
        planned: of queries that see everything so far.
        window: tokens.
    """
    parts = []
    for part in planned:
        last = part.visible.sum(-1, keepdim=True) - 1
        near = torch.arange(part.visible.shape[-1]) > last - window
        parts.append(replace(part, visible=part.visible & near))
    return parts


def window_of(layer: RadixAttention) -> int:
    """Tokens that a token of this layer sees, itself included; 0 is all before it.

    SGLang's number is of those before it.
    """
    size = layer.sliding_window_size
    return size + 1 if size is not None and size > -1 else 0


class BatchedCpuAttention(TorchNativeAttnBackend):
    """SGLang's CPU backend with causal self-attention batched; all else is its own."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._plan: dict[int, list[Slice]] = {}
        """By window; 0 is none."""
        self._decode_plan: dict[tuple[int, int], list[DecodeSlice]] = {}
        """By number of key/value heads and window."""
        self._batch: ForwardBatch | None = None
        self._tree = False
        """Whether the new tokens are drafts in a tree, whose places are not their positions."""

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan one forward pass; SGLang calls this before the layers run."""
        super().init_forward_metadata(forward_batch)
        self._batch, self._plan, self._decode_plan = forward_batch, {}, {}
        self._tree = False
        lens, new = forward_batch.seq_lens, forward_batch.extend_seq_lens
        rows, table = forward_batch.req_pool_indices, self.req_to_token_pool.req_to_token
        if forward_batch.forward_mode.is_target_verify():
            self._plan[0] = self._plan_drafts(table, rows, lens, forward_batch.spec_info)
        elif len(lens) and new is not None and not forward_batch.forward_mode.is_decode_or_idle():
            self._plan[0] = plan(table, rows, lens, new)

    def _plan_drafts(
        self, table: torch.Tensor, rows: torch.Tensor, lens: torch.Tensor, drafts: Any
    ) -> list[Slice]:
        """Lay out the pass that verifies drafts: chains, or trees whose nodes see their path."""
        from kit.engine.cpu.speculative import see_tree

        n = drafts.draft_token_num
        whole = lens + n
        planned = plan(table, rows, whole, torch.full_like(lens, n))
        if drafts.tree_topk == 1:
            return planned
        mask = drafts.custom_mask[: len(lens) * n * n].view(-1, n, n).bool()
        if torch.equal(mask, mask.new_ones(n, n).tril().expand_as(mask)):  # all are chains
            return planned
        self._tree = True
        return see_tree(planned, mask, whole)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend for the new tokens of a prefill, padded; `sinks` are one number a head."""
        if not self.is_supported(layer, sinks):
            whole: torch.Tensor = super().forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache
            )
            return whole
        keys, values = self._cache(k, v, layer, forward_batch, save_kv_cache)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = []
        for part in self._planned(window_of(layer)):
            attended = self._attend_new(query, keys, values, part, layer, sinks)
            # Padding left out, the queries stand in the order in which they were packed.
            outputs.append(
                attended.flatten(0, 1) if part.is_query is None else attended[part.is_query]
            )
        return torch.cat(outputs).flatten(1)

    def _planned(self, window: int) -> list[Slice]:
        if window not in self._plan:
            if self._tree:
                raise RuntimeError(
                    "A tree of drafts cannot be verified in layers with a sliding window. Set "
                    "engine.speculative.eagle_topk: 1."
                )
            self._plan[window] = within_window(self._plan[0], window)
        return self._plan[window]

    def _attend_new(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        part: Slice,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of a slice's new tokens, padded: (B, Q, heads, D)."""
        rows = query.index_select(0, part.query_rows.flatten())
        padded = rows.unflatten(0, part.query_rows.shape).transpose(1, 2)
        k, v = (_gather(x, part.cache_slots).to(query.dtype) for x in (keys, values))
        if layer.logit_cap or sinks is not None:
            grouped = padded.unflatten(1, (k.shape[1], -1))  # (B, H, group, Q, D)
            scores = grouped @ k[:, :, None].transpose(-1, -2) * layer.scaling
            own = None if sinks is None else sinks.view(*grouped.shape[1:3], 1, 1)
            taken = shares(scores, part.visible[:, None], layer.logit_cap, own)
            return (taken @ v[:, :, None]).flatten(1, 2).transpose(1, 2)
        return scaled_dot_product_attention(
            padded, k, v, attn_mask=part.visible, scale=layer.scaling, enable_gqa=True
        ).transpose(1, 2)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend for one new token a request; `sinks` are one number a head."""
        if not self.is_supported(layer, sinks):
            whole: torch.Tensor = super().forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache
            )
            return whole
        keys, values = self._cache(k, v, layer, forward_batch, save_kv_cache)
        q = q.reshape(-1, layer.tp_q_head_num * layer.qk_head_dim)
        attended = self._attend_decoded(q, keys, values, layer, forward_batch, sinks)
        return attended.view(len(q), -1)

    def _attend_decoded(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Attention of one new token a request: two products of small matrices."""
        heads = keys.shape[1]
        query = q.reshape(len(q) * heads, -1, layer.qk_head_dim)  # heads of one group side by side
        outputs = []
        for part in self._decoding(heads, window_of(layer)):
            first, last, _ = part.requests.indices(len(q))
            k, v = (
                x.flatten(0, 1)
                .index_select(0, part.cache_rows)
                .view(len(part.hidden), -1, x.shape[-1])
                .to(q.dtype)
                for x in (keys, values)
            )
            own = query[first * heads : last * heads]
            if layer.logit_cap or sinks is not None:
                scores = torch.bmm(own, k.transpose(1, 2)) * layer.scaling
                sink = None
                if sinks is not None:
                    sink = sinks.view(heads, -1, 1).repeat(last - first, 1, 1)
                taken = shares(scores, part.hidden == 0, layer.logit_cap, sink)
            else:
                scores = torch.baddbmm(
                    part.hidden.to(q.dtype), own, k.transpose(1, 2), alpha=layer.scaling
                )
                taken = torch.softmax(scores, dim=-1)
            outputs.append(torch.bmm(taken, v))
        return torch.cat(outputs)

    def _decoding(self, heads: int, window: int) -> list[DecodeSlice]:
        if (heads, window) not in self._decode_plan:
            assert self._batch is not None
            self._decode_plan[heads, window] = decode_plan(
                self.req_to_token_pool.req_to_token,
                self._batch.req_pool_indices,
                self._batch.seq_lens,
                heads,
                window,
            )
        return self._decode_plan[heads, window]

    def is_supported(self, layer: RadixAttention, sinks: torch.Tensor | None = None) -> bool:
        """Causal self-attention: what this class does itself.

        Raises:
            RuntimeError: there are sinks, and all else is SGLang's own, which has none.
        """
        encoder = layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY
        own = not (encoder or self.use_sliding_window_kv_pool)
        if not own and (sinks is not None or layer.logit_cap):
            raise RuntimeError("sinks and soft caps take causal attention over one cache")
        return own

    def _cache(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new keys and values, and return this layer's, (slots, H, D)."""
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            where = KVWriteLoc(forward_batch.out_cache_loc, self.swa_out_cache_loc)
            pool.set_kv_buffer(layer, where, k, v)
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)


def _gather(cache: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Gather rows of the cache (slots, H, D) at these slots (B, K), as (B, H, K, D)."""
    rows = cache.index_select(0, slots.flatten())
    return rows.view(*slots.shape, *cache.shape[1:]).transpose(1, 2)


def register() -> None:
    """Put this backend in the place of `torch_native` in the SGLang of this process.

    Under that very name, because SGLang asks for it by name where it chooses plain torch code
    over Triton kernels.
    """
    ATTENTION_BACKENDS["torch_native"] = BatchedCpuAttention
