"""Attention for SGLang on a CPU: the whole batch in one call per layer.

SGLang's own `torch_native` backend attends request by request in Python. Here the keys and values
of all requests are gathered from the cache into one padded tensor, and one call attends for all
(in decoding, where torch's attention is slow, two products).
Which cache slots, and who may see whom, is worked out once a step and shared by all layers.

Shapes: B requests, Q new tokens a request (1 in decode), K tokens seen at most, H key/value heads,
D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from torch.nn.functional import scaled_dot_product_attention

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
    req_to_token: torch.Tensor, rows: torch.Tensor, seq_lens: torch.Tensor, heads: int
) -> list[DecodeSlice]:
    """Lay out one decoding step; arguments as for `plan`, and the number of key/value heads."""
    size = max(1, PADDED_SCORES // int(seq_lens.max()))
    slices = []
    for first in range(0, len(rows), size):
        part = slice(first, first + size)
        lens = seq_lens[part, None]
        seen = torch.arange(int(lens.max()))[None]
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


class BatchedCpuAttention(TorchNativeAttnBackend):
    """SGLang's CPU backend with causal self-attention batched; all else is its own."""

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__(model_runner)
        self._plan: list[Slice] = []
        self._decode_plan: dict[int, list[DecodeSlice]] = {}
        """By number of key/value heads: nearly always one."""
        self._batch: ForwardBatch | None = None

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        """Plan one forward pass; SGLang calls this before the layers run."""
        super().init_forward_metadata(forward_batch)
        self._batch, self._plan, self._decode_plan = forward_batch, [], {}
        lens, new = forward_batch.seq_lens, forward_batch.extend_seq_lens
        rows, table = forward_batch.req_pool_indices, self.req_to_token_pool.req_to_token
        if forward_batch.forward_mode.is_target_verify():
            self._plan = self._plan_drafts(table, rows, lens, forward_batch.spec_info)
        elif len(lens) and new is not None and not forward_batch.forward_mode.is_decode_or_idle():
            self._plan = plan(table, rows, lens, new)

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
        return see_tree(planned, mask, whole)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attend for the new tokens of a prefill, padded."""
        if not self.is_supported(layer):
            whole: torch.Tensor = super().forward_extend(
                q, k, v, layer, forward_batch, save_kv_cache
            )
            return whole
        keys, values = self._cache(k, v, layer, forward_batch, save_kv_cache)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        outputs = []
        for part in self._plan:
            attended = self._attend_new(query, keys, values, part, layer)
            # Padding left out, the queries stand in the order in which they were packed.
            outputs.append(
                attended.flatten(0, 1) if part.is_query is None else attended[part.is_query]
            )
        return torch.cat(outputs).flatten(1)

    def _attend_new(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        part: Slice,
        layer: RadixAttention,
    ) -> torch.Tensor:
        """Attention of a slice's new tokens, padded: (B, Q, heads, D)."""
        rows = query.index_select(0, part.query_rows.flatten())
        return scaled_dot_product_attention(
            rows.unflatten(0, part.query_rows.shape).transpose(1, 2),
            _gather(keys, part.cache_slots).to(query.dtype),
            _gather(values, part.cache_slots).to(query.dtype),
            attn_mask=part.visible,
            scale=layer.scaling,
            enable_gqa=True,
        ).transpose(1, 2)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Attend for one new token a request."""
        if not self.is_supported(layer):
            whole: torch.Tensor = super().forward_decode(
                q, k, v, layer, forward_batch, save_kv_cache
            )
            return whole
        keys, values = self._cache(k, v, layer, forward_batch, save_kv_cache)
        return self._attend_decoded(q, keys, values, layer, forward_batch).view(len(q), -1)

    def _attend_decoded(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
    ) -> torch.Tensor:
        """Attention of one new token a request: two products of small matrices."""
        heads = keys.shape[1]
        query = q.reshape(len(q) * heads, -1, layer.qk_head_dim)  # heads of one group side by side
        outputs = []
        for part in self._decoding(heads):
            first, last, _ = part.requests.indices(len(q))
            k, v = (
                x.flatten(0, 1)
                .index_select(0, part.cache_rows)
                .view(len(part.hidden), -1, x.shape[-1])
                .to(q.dtype)
                for x in (keys, values)
            )
            scores = torch.baddbmm(
                part.hidden.to(q.dtype),
                query[first * heads : last * heads],
                k.transpose(1, 2),
                alpha=layer.scaling,
            )
            outputs.append(torch.bmm(torch.softmax(scores, dim=-1), v))
        return torch.cat(outputs)

    def _decoding(self, heads: int) -> list[DecodeSlice]:
        if heads not in self._decode_plan:
            assert self._batch is not None
            self._decode_plan[heads] = decode_plan(
                self.req_to_token_pool.req_to_token,
                self._batch.req_pool_indices,
                self._batch.seq_lens,
                heads,
            )
        return self._decode_plan[heads]

    def is_supported(self, layer: RadixAttention) -> bool:
        """Causal self-attention over everything so far: what this class does itself."""
        windowed = layer.sliding_window_size is not None and layer.sliding_window_size > -1
        encoder = layer.is_cross_attention or layer.attn_type == AttentionType.ENCODER_ONLY
        return not (windowed or encoder or self.use_sliding_window_kv_pool)

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
