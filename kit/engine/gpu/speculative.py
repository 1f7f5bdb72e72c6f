"""Speculative decoding on a GPU: what drafts and verifies there.

Which tokens are accepted says `kit.engine.drafts.verification`, what they attend to
`kit.engine.gpu.draft_attention`. SGLang verifies, drafts and reads what was accepted in CUDA graphs
with its Triton attention, which is what the kit's engines have; with FlashAttention-3 it has no
graph for reading what was accepted.

Read from SGLang 0.5.16:
    speculative/draft_utils.py     DraftBackendFactory: which attention a draft computes with
    layers/attention/triton_backend.py   TritonMultiStepDraftBackend: a step less than it is told;
                                   each branch's places begin by the steps that it is told
    speculative/eagle_worker_v2.py   EagleDraftWorker._capture_cuda_graphs, which is called once all
                                   memory is taken
    speculative/ngram_worker.py    NGRAMWorker._prepare_for_speculative_decoding: makes the mask
                                   request by request, with some ten launches for each
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from kit.engine.drafts import verification
from kit.engine.drafts.scheduler import reads_all_it_drafts
from kit.engine.gpu import draft_attention as attention

if TYPE_CHECKING:
    from kit.engine.drafts.settings import SpeculativeSettings


def whole_mask(own: torch.Tensor, lens: torch.Tensor, total: int) -> torch.Tensor:
    """The mask of trees that SGLang's Triton attention reads, flat: all before, and their own path.

    Args:
        own: whether a node sees another of its request's, (B, n, n).
        lens: tokens of each request before its nodes, (B,).
        total: their sum.
    """
    count, n, _ = own.shape
    mask = torch.ones(n * (total + count * n), dtype=torch.bool, device=own.device)
    widths = lens.long() + n  # of a node's row
    begins = (n * widths).cumsum(0) - n * widths
    nodes = torch.arange(n, device=own.device)
    rows = begins[:, None] + nodes * widths[:, None] + lens.long()[:, None]  # (B, n)
    mask[(rows[:, :, None] + nodes).flatten()] = own.flatten()
    return mask


def capture_graphs(worker: Any) -> None:
    """Capture the graphs of a draft: its steps, if it takes any, and its reading, if it needs any.

    In place of SGLang's, which takes no graph for a single step, and imports kinds of attention
    that need further packages.

    Args:
        worker: SGLang's, of the draft.
    """
    from sglang.srt.model_executor.cuda_graph_config import (
        Backend,
        Phase,
        check_cuda_graph_backend,
    )
    from sglang.srt.speculative.eagle_draft_cuda_graph_runner import EAGLEDraftCudaGraphRunner
    from sglang.srt.speculative.eagle_draft_extend_cuda_graph_runner import (
        EAGLEDraftExtendCudaGraphRunner,
    )

    worker.cuda_graph_runner = worker.cuda_graph_runner_for_draft_extend = None
    if check_cuda_graph_backend(Phase.DECODE, Backend.DISABLED):
        return
    if worker.draft_attn_backend is not None:
        worker.cuda_graph_runner = EAGLEDraftCudaGraphRunner(worker)
    if not reads_all_it_drafts(worker):
        worker.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(worker)


def whole_steps(runner: Any, topk: int, steps: int) -> Any:
    """Attention of the steps of a draft that reads the last accepted token itself.

    SGLang's takes a step less than it is told, so it is told of one more, and of two in a chain,
    which reads its last token, too. In a tree, each branch begins where the one before it ends,
    which goes by the steps that there are.

    Args:
        runner: SGLang's, of the draft.
        topk: branches.
        steps: of the draft.
    """
    from sglang.srt.layers.attention.triton_backend import TritonMultiStepDraftBackend
    from sglang.srt.speculative.spec_utils import draft_kv_indices_used_len

    kind: Any = TritonMultiStepDraftBackend
    if topk == 1:
        return kind(runner, topk, steps + 2)

    class WholeSteps(kind):
        def common_template(self, batch: Any, places: Any, plan: Any) -> None:
            self.speculative_num_steps = steps
            super().common_template(batch, places, None)
            self.speculative_num_steps = steps + 1
            if plan is None:
                return
            rows = self.cuda_graph_kv_indices if places is None else places
            branches, seen = topk * batch.batch_size, batch.seq_lens_sum
            if seen is None:
                seen = batch.batch_size * self.max_context_len
            for step in range(steps):
                used = draft_kv_indices_used_len(seen, topk, branches, step + 1)
                batch.spec_info.kv_indptr = self.kv_indptr[step, : branches + 1]
                batch.spec_info.kv_indices = rows[step][:used]
                plan(step, batch)

    return WholeSteps(runner, topk, steps + 1)


def register(drafts: SpeculativeSettings) -> None:
    """Have this process' SGLang draft and verify so."""
    verification.register()
    attention.stands_in(import_module("sglang.kernels.ops.attention.extend_attention"))
    if not drafts.has_draft:
        _register_ngrams()
        return
    from sglang.srt.speculative.draft_utils import DraftBackendFactory
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    worker: Any = EagleDraftWorker
    worker._capture_cuda_graphs = capture_graphs
    if drafts.is_model:

        def make_steps(self: Any) -> Any:
            steps = self.speculative_num_steps  # 0 for passes without drafts
            return whole_steps(self.draft_model_runner, self.topk, steps) if steps else None

        factory: Any = DraftBackendFactory
        factory.create_decode_backend = make_steps


def _register_ngrams() -> None:
    from sglang.srt.speculative import ngram_worker

    ngram_worker.USE_FULL_MASK = False
    worker: Any = ngram_worker.NGRAMWorker
    prepare = worker._prepare_for_speculative_decoding

    def prepare_with_mask(self: Any, batch: Any) -> None:
        prepare(self, batch)
        if batch.forward_mode.is_target_verify():
            info, lens = batch.spec_info, batch.seq_lens
            n = info.draft_token_num
            own = info.custom_mask.view(-1, n, n)
            info.custom_mask = whole_mask(own, lens, int(batch.seq_lens_cpu.sum()))

    worker._prepare_for_speculative_decoding = prepare_with_mask
