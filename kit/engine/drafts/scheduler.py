"""Speculative decoding: what is changed in SGLang's scheduler for it, on CPUs and GPUs alike.

Whatever the draft, responses are the target's: drafted tokens are accepted where the target would
have written them. A sync of the policy reaches the target alone, one of the draft the draft alone.

A draft that is a model of its own (`standalone`) is called by SGLang like a head on the target's
hidden states, which reads the token after each place, and so never sees the first token of a
prompt. For a model that learned from whole texts that is another text. Here it reads every token in
its own place: a prompt as it is, then the accepted tokens, and each draft begins with the last of
them. In a chain it goes on to read the last token that it drafts, too. Whatever is accepted then,
it has read already, and it need not be called once more after the pass, as SGLang does; only in
trees, whose accepted tokens change their places, and in passes without drafts it is.

An EAGLE head (`eagle`) is called as SGLang calls it. Its embeddings and its output are the target's
tensors, so that a sync of the policy changes them, and one of the draft does not.

Read from SGLang 0.5.16, and changed in its scheduler:
    speculative/eagle_worker_v2.py       EAGLEWorkerV2.update_weights_from_tensor: loads what comes
                                         into draft and target; ours into the draft
                                         EagleDraftWorker.draft_forward, _draft_extend_for_prefill,
                                         _draft_extend_for_decode
    managers/schedule_batch.py           Req.update_finish_state: see `within_limit`
                                         Req.update_spec_correct_drafts_histogram: see `note_pass`;
                                         it is called before the tokens are appended
    managers/scheduler_components/batch_result_processor.py
                                         SchedulerBatchResultProcessor._resolve_spec_v2_tokens,
                                         which calls it for each request of a pass
    speculative/standalone_worker_v2.py  StandaloneDraftWorker; StandaloneWorkerV2, which lacks `ps`
    models/llama_eagle.py                LlamaForCausalLMEagle: its parameters' names
    models/glm4_moe_nextn.py             Glm4MoeForCausalLMNextN.set_embed_and_head
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kit.engine.drafts.choice import DraftChoice
    from kit.engine.drafts.settings import SpeculativeSettings


def register(settings: SpeculativeSettings) -> None:
    """Change this process' SGLang as the top of this module says."""
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler_components.batch_result_processor import (
        SchedulerBatchResultProcessor,
    )

    request: Any = Req
    if not hasattr(request.update_finish_state, "within_limit"):
        request.update_finish_state = within_limit(request.update_finish_state)
    request.update_spec_correct_drafts_histogram = note_pass
    processor: Any = SchedulerBatchResultProcessor
    if not hasattr(processor._resolve_spec_v2_tokens, "notes"):
        processor._resolve_spec_v2_tokens = read_noting(processor._resolve_spec_v2_tokens)
    if not settings.has_draft:
        return
    from sglang.srt.managers.scheduler_components.weight_updater import (
        SchedulerWeightUpdaterManager,
    )
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

    updater: Any = SchedulerWeightUpdaterManager
    check = updater.check_weights
    updater.check_weights = lambda self, request: _check(check, self, request)
    worker: Any = EAGLEWorkerV2
    worker.update_weights_from_tensor = load_draft
    if settings.is_model:
        from sglang.srt.speculative.standalone_worker_v2 import StandaloneDraftWorker

        drafting: Any = StandaloneDraftWorker
        drafting.init_lm_head = read_without_logits
        drafting.draft_forward = draft_forward
        drafting._draft_extend_for_prefill = read_prompts
        drafting._draft_extend_for_decode = read_accepted
    if settings.architecture == "Glm4MoeForCausalLMNextN":
        from sglang.srt.models.glm4_moe_nextn import Glm4MoeForCausalLMNextN

        layer: Any = Glm4MoeForCausalLMNextN
        layer.set_embed_and_head = share_embeddings
    if settings.where_it_pays:
        from kit.engine.drafts import choice

        choice.register()


def share_embeddings(layer: Any, embedding: Any, output: Any) -> None:
    """Give a layer that drafts the embeddings of its model, the very tensors.

    In place of SGLang's for GLM-4.5, which waits for a GPU also on a CPU.
    """
    del layer.model.embed_tokens.weight
    del layer.lm_head.weight
    layer.model.embed_tokens.weight = embedding
    layer.lm_head.weight = output


class _Reading:
    """The pass whose result this process' scheduler is reading."""

    proposed = 0
    choice: DraftChoice | None = None


def read_noting(read: Any) -> Any:
    """Have `note_pass` know of which pass a result is.

    Args:
        read: SGLang's `SchedulerBatchResultProcessor._resolve_spec_v2_tokens`.
    """

    def read_and_note(processor: Any, result: Any, batch: Any) -> Any:
        _Reading.proposed = result.speculative_num_draft_tokens - 1
        _Reading.choice = processor.model_worker.adaptive_controller
        return read(processor, result, batch)

    read_and_note.notes = True  # type: ignore[attr-defined]
    return read_and_note


def note_pass(request: Any, num_correct_drafts: int) -> None:
    """Note a pass of a request, as the fields of a `Note`.

    In place of SGLang's histogram, which tells of no place and goes the same way.
    """
    seconds, plain = _Reading.choice.last_pass if _Reading.choice else (0.0, 0.0)
    times = round(seconds * 1e6), round(plain * 1e6)
    request.spec_correct_drafts_histogram += [
        len(request.output_ids), num_correct_drafts, _Reading.proposed, *times
    ]  # fmt: skip


def within_limit(update: Any) -> Any:
    """Have requests that reach their limit of tokens look for an end among those within it.

    SGLang looks at the limit first. A pass may give several tokens, though: an end, and more of
    them after it up to the limit, which nobody would have written.

    Args:
        update: SGLang's `Req.update_finish_state`.
    """

    def update_within_limit(request: Any, new_accepted_len: int = 1) -> None:
        limit = request.sampling_params.max_new_tokens
        whole = request.output_ids
        beyond = len(whole) - limit
        if beyond >= 0 and not (request.finished() or request.to_finish):
            within = new_accepted_len - beyond
            request.output_ids = whole[:limit]
            if not request._check_str_based_finish(within):
                request._check_token_based_finish(request.output_ids[-within:])
            request.output_ids = whole
        update(request, new_accepted_len)  # which leaves what is finished as it is

    update_within_limit.within_limit = True  # type: ignore[attr-defined]
    return update_within_limit


def _check(check: Any, updater: Any, request: Any) -> Any:
    """Have SGLang's checker look at the draft too, and do everything else to the target alone."""
    if request.action == "checksum":
        return check(updater, request)
    draft, updater.draft_worker = updater.draft_worker, None
    try:
        return check(updater, request)
    finally:
        updater.draft_worker = draft


def load_draft(worker: Any, request: Any) -> tuple[bool, str]:
    """Load weights into a worker's draft, and into nothing else."""
    from sglang.srt.utils.common import MultiprocessingSerializer
    from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

    monkey_patch_torch_reductions()
    drafting = worker.draft_worker
    tensors = MultiprocessingSerializer.deserialize(
        request.serialized_named_tensors[drafting.ps.tp_rank]
    )
    updater = drafting.draft_runner.weight_updater
    answer: tuple[bool, str] = updater.update_weights_from_tensor(
        named_tensors=tensors, load_format=request.load_format
    )
    return answer


def reads_all_it_drafts(worker: Any) -> bool:
    """Whether a draft reads all tokens of what it drafts as it does so, in their own places.

    Args:
        worker: SGLang's, of the draft.
    """
    return hasattr(worker, "only_reads") and worker.topk == 1 and worker.speculative_num_steps > 0


def read_without_logits(worker: Any) -> None:
    """Have a draft make no logits where it only reads: what was accepted, or its own last token.

    In place of SGLang's `StandaloneDraftWorker.init_lm_head`, which does nothing and is called once
    the draft is there. What it drafts from there comes of a step of its own.

    Args:
        worker: SGLang's, of the draft.
    """
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    processor = worker.draft_runner.model.logits_processor
    process = processor.forward
    worker.only_reads = False

    def leave_out(tokens: Any, hidden: Any, head: Any, metadata: Any, *args: Any, **kw: Any) -> Any:
        if not (worker.only_reads or metadata.forward_mode.is_draft_extend_v2()):
            return process(tokens, hidden, head, metadata, *args, **kw)
        kept = hidden if metadata.capture_hidden_mode.need_capture() else None
        return LogitsProcessorOutput(hidden.new_zeros(len(hidden), worker.topk), kept)

    processor.forward = leave_out


def read_prompts(
    worker: Any, batch: Any, hidden: Any, next_tokens: Any, mm_input_embeds: Any = None
) -> Any:
    """Have a draft read prompts; what it drafts from next is the token that follows each of them.

    Args:
        worker: SGLang's, of the draft.
        batch: whose prompts, or parts of prompts, the target has read.
        hidden: the target's hidden states, which this draft does not read.
        next_tokens: what the target wrote after each, (B).
        mm_input_embeds: as SGLang calls it; None.
    """
    from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode, ForwardBatch
    from sglang.srt.speculative.eagle_info import EagleDraftExtendInput, EagleDraftInput

    batch.spec_info = EagleDraftExtendInput(
        hidden_states=hidden, num_tokens_per_req=1, num_tokens_for_logprob_per_req=1
    )
    forward_batch = ForwardBatch.init_new(
        batch,
        worker.draft_runner,
        capture_hidden_mode=CaptureHiddenMode.NULL,
        return_hidden_states_before_norm=False,
    )
    forward_batch.return_logprob = False
    worker.draft_runner.forward(forward_batch)
    drafted, chances = _begin_with(next_tokens, worker.topk)
    return EagleDraftInput(
        topk_p=chances,
        topk_index=drafted,
        hidden_states=None,
        bonus_tokens=next_tokens,
        num_tokens_per_req=1,
        num_tokens_for_logprob_per_req=1,
    )


def read_accepted(worker: Any, batch: Any, result: Any) -> None:
    """Have a draft read what was accepted, in the places in which the target has read it.

    That is the last token of before, the root of the tree, and all accepted ones but the last. A
    chain has read them as it drafted them.
    """
    import torch
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    following = result.next_draft_input
    if reads_all_it_drafts(worker):
        following.topk_index, following.topk_p = _begin_with(following.bonus_tokens, 1)
        following.hidden_states = None
        return
    n = worker.speculative_num_draft_tokens
    roots = batch.spec_info.draft_token.view(-1, n)[:, :1]
    accepted = result.next_token_ids.view(-1, n)
    own = torch.cat([roots.to(accepted.dtype), accepted[:, :-1]], dim=1)
    EagleDraftWorker._draft_extend_for_decode(
        worker, batch, replace(result, next_token_ids=own.flatten())
    )
    following.topk_index, following.topk_p = _begin_with(following.bonus_tokens, worker.topk)


def _begin_with(tokens: Any, topk: int) -> tuple[Any, Any]:
    """(tokens, chances), (B, topk), of a draft that begins by reading these tokens, (B)."""
    import torch

    first = tokens.long()[:, None].expand(-1, topk).contiguous()
    return first, torch.ones_like(first, dtype=torch.float32)


def _read_last(worker: Any, forward_batch: Any, tokens: Any, firsts: Any) -> None:
    """Read the last drafted tokens, whose positions the batch has, into the places that follow.

    Args:
        worker: SGLang's, of the draft.
        forward_batch: of the draft, after its last step.
        tokens: the last ones of the chains, (B).
        firsts: places of their first tokens, (B): 0, which nobody reads, in rows that fill a graph.
    """
    import torch

    table = worker.req_to_token_pool.req_to_token
    places = table[forward_batch.req_pool_indices.long(), forward_batch.positions.long()]
    forward_batch.out_cache_loc = torch.where(firsts == 0, 0, places.to(firsts.dtype))
    forward_batch.input_ids = tokens.contiguous()
    worker.only_reads = True
    try:
        worker.draft_runner.forward(forward_batch)
    finally:
        worker.only_reads = False


def draft_forward(worker: Any, forward_batch: Any) -> Any:
    """Read the last accepted token in every branch, then draft as SGLang does from there.

    A chain is read to its end. What it is given is left as it was: a CUDA graph is captured from
    several calls.
    """
    import torch
    from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker
    from sglang.srt.speculative.spec_utils import renorm_draft_probs
    from sglang.srt.utils.common import fast_topk

    info, steps, topk = forward_batch.spec_info, worker.speculative_num_steps, worker.topk
    began_with = info.topk_index, info.topk_p
    attention = worker.draft_attn_backend
    if steps == 1 and not forward_batch.forward_metadata_ready:
        # SGLang plans no attention where it takes no step, except for a graph.
        attention.init_forward_metadata(forward_batch)
        forward_batch.mark_forward_metadata_ready()
    slots = forward_batch.out_cache_loc.view(-1, steps)
    forward_batch.input_ids = info.topk_index.flatten()
    forward_batch.out_cache_loc = slots[:, 0].contiguous()
    first, *others = attention.attn_backends
    with forward_context(ForwardContext(attn_backend=first)):
        logits = worker.draft_runner.forward(forward_batch).logits_output.next_token_logits
    logits = logits[::topk]  # all branches of a request have read the same
    if topk == 1:
        info.topk_index = logits.argmax(dim=-1, keepdim=True)
        info.topk_p = torch.ones_like(info.topk_index, dtype=torch.float32)
    else:
        chances = renorm_draft_probs(logits, forward_batch.sampling_info, False)
        info.topk_p, info.topk_index = fast_topk(chances, topk, dim=-1)
    forward_batch.positions.add_(1)
    forward_batch.out_cache_loc = slots.roll(-1, dims=1).flatten()
    attention.attn_backends = others
    try:
        drafted = EagleDraftWorker.draft_forward(worker, forward_batch)
        if topk == 1:
            with forward_context(ForwardContext(attn_backend=others[-1])):
                _read_last(worker, forward_batch, drafted[2][:, -1], slots[:, 0])
        return drafted
    finally:
        attention.attn_backends = [first, *others]
        info.topk_index, info.topk_p = began_with
        forward_batch.positions.sub_(1)
