"""Speculative decoding on a GPU: what drafts and verifies there.

Which tokens are accepted says `kit.engine.drafts.verification`, what they attend to
`kit.engine.gpu.draft_attention`. SGLang verifies, drafts and reads what was accepted in CUDA graphs
with its Triton attention, which is what the kit's engines have; with FlashAttention-3 it has no
graph for reading what was accepted.

Read from SGLang 0.5.16:
    speculative/draft_utils.py     DraftBackendFactory: which attention a draft computes with
    layers/attention/triton_backend.py   TritonMultiStepDraftBackend: a step less than it is told
    speculative/standalone_worker_v2.py  StandaloneDraftWorker: _capture_cuda_graphs of its base,
                                   which is called once all memory is taken
    speculative/ngram_worker.py    NGRAMWorker._prepare_for_speculative_decoding: makes the mask
                                   request by request, with some ten launches for each
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from kit.engine.drafts import verification
from kit.engine.gpu import draft_attention as attention


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
    """Capture the graphs of a draft that is a model of its own: its steps, and its reading.

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
    if worker.speculative_num_steps:
        worker.cuda_graph_runner = EAGLEDraftCudaGraphRunner(worker)
    worker.cuda_graph_runner_for_draft_extend = EAGLEDraftExtendCudaGraphRunner(worker)


def register(*, whole_draft: bool) -> None:
    """Have this process' SGLang draft and verify so.

    `whole_draft`: the draft is a model of its own, which reads every token itself
    (`kit.engine.drafts.scheduler`).
    """
    from sglang.srt.speculative import ngram_worker
    from sglang.srt.speculative.draft_utils import DraftBackendFactory

    verification.register()
    attention.stands_in(import_module("sglang.kernels.ops.attention.extend_attention"))
    if whole_draft:
        from sglang.srt.layers.attention.triton_backend import TritonMultiStepDraftBackend
        from sglang.srt.speculative import standalone_worker_v2

        drafting: Any = standalone_worker_v2

        def make_steps(self: Any) -> Any:
            if not self.speculative_num_steps:  # for passes without drafts
                return None
            # One more: the draft reads the last accepted token itself.
            steps = self.speculative_num_steps + 1
            return TritonMultiStepDraftBackend(self.draft_model_runner, self.topk, steps)

        factory: Any = DraftBackendFactory
        factory.create_decode_backend = make_steps
        drafting.StandaloneDraftWorker._capture_cuda_graphs = capture_graphs
        return
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
