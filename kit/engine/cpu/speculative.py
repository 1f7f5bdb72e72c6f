"""Speculative decoding on a CPU: attention of drafted tokens.

Which of them are accepted says `kit.engine.drafts.verification`.

Read from SGLang 0.5.16:
    speculative/draft_utils.py     DraftBackendFactory: which attention a draft computes with
    environ.py                     SGLANG_NATIVE_MOVE_KV_CACHE: accepted nodes are moved in torch
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch

from kit.engine.cpu.attention import BatchedCpuAttention, DecodeSlice, Slice, decode_plan
from kit.engine.drafts import verification


def see_tree(plan: list[Slice], mask: torch.Tensor, lens: torch.Tensor) -> list[Slice]:
    """A plan in which each node of a tree sees what came before the tree, and its own path.

    Args:
        plan: of one forward pass of the nodes, n to a request, each of which would see all before.
        mask: whether a node sees another of its request's, (B, n, n).
        lens: tokens of each request, its nodes included, (B,).
    """
    n, first, parts = mask.shape[1], 0, []
    for part in plan:
        here = slice(first, first + len(part.query_rows))
        first = here.stop
        place = torch.arange(part.visible.shape[-1]) - (lens[here, None] - n)  # (B, K): its node
        own = mask[here].gather(2, place.clamp(0, n - 1)[:, None].expand(-1, n, -1))
        seen = torch.where((place < 0)[:, None], True, own & (place < n)[:, None])
        parts.append(replace(part, visible=seen[:, None]))
    return parts


class DraftStep(BatchedCpuAttention):
    """Attention of one step of a draft; `DraftSteps` says what it sees."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.table = self.lens = torch.empty(0)

    def see(self, table: torch.Tensor, lens: torch.Tensor) -> None:
        """Have row i of the batch see the first `lens[i]` cache slots of row i of `table`."""
        self.table, self.lens, self._decode_plan = table, lens, {}

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Do nothing: all steps were planned at once."""

    def _decoding(self, heads: int, window: int) -> list[DecodeSlice]:
        if (heads, window) not in self._decode_plan:
            rows = torch.arange(len(self.lens))
            planned = decode_plan(self.table, rows, self.lens, heads, window)
            self._decode_plan[heads, window] = planned
        return self._decode_plan[heads, window]


class DraftSteps:
    """Attention of the steps of a draft, each a token longer than the one before.

    Each of a request's `topk` branches sees the request and what the branch has written so far.
    """

    def __init__(self, model_runner: Any, topk: int, slots: int, steps: int) -> None:
        """`slots` cache slots a branch has; each of `steps` steps fills one, or the one after."""
        self.topk, self.slots = topk, slots
        self.attn_backends = [DraftStep(model_runner) for _ in range(steps)]

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Plan all steps."""
        table = self.attn_backends[0].req_to_token_pool.req_to_token
        rows = table[forward_batch.req_pool_indices.long()].repeat_interleave(self.topk, 0)
        lens = forward_batch.seq_lens.long().repeat_interleave(self.topk)
        own = forward_batch.out_cache_loc.view(len(lens), self.slots).to(rows.dtype)
        places = (lens[:, None] + torch.arange(self.slots)).clamp(max=rows.shape[1] - 1)
        rows.scatter_(1, places, own)
        for step, backend in enumerate(self.attn_backends, 1):
            backend.see(rows, lens + step)


def register(*, whole_draft: bool) -> None:
    """Have this process' SGLang draft and verify so.

    `whole_draft`: the draft is a model of its own, which reads every token itself
    (`kit.engine.drafts.scheduler`).
    """
    os.environ["SGLANG_NATIVE_MOVE_KV_CACHE"] = "1"
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    verification.register()

    def make_steps(self: Any) -> DraftSteps | None:
        slots = self.speculative_num_steps
        steps = slots + (self.topk == 1) if whole_draft else slots - 1
        if not slots or not steps:
            return None
        return DraftSteps(self.draft_model_runner, self.topk, slots, steps)

    factory: Any = DraftBackendFactory
    factory.create_decode_backend = make_steps
    factory.create_draft_extend_backend = lambda self: BatchedCpuAttention(self.draft_model_runner)
