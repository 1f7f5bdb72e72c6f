"""Speculative decoding: what an engine is told of it, and what is changed in SGLang for it.

Whatever the draft, responses are the target's: drafted tokens are accepted where the target would
have written them. A sync of the policy reaches the target alone, one of the draft the draft alone.

A draft that is a model of its own (`standalone`) is called by SGLang like a head on the target's
hidden states, which reads the token after each place, and so never sees the first token of a
prompt. For a model that learned from whole texts that is another text. Here it reads every token in
its own place: a prompt as it is, then the accepted tokens, and each draft begins with the last of
them. That takes a step of the draft more in each round.

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
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

from kit.errors import StackError

if TYPE_CHECKING:
    from kit.config import SpeculativeConfig
    from kit.engine.draft_choice import DraftChoice

DRAFT_OF = "draft."
"""Begins the names of a draft's weights among those of the engine."""


@dataclass(frozen=True, slots=True)
class SpeculativeSettings:
    """How an engine drafts."""

    algorithm: str
    num_steps: int
    topk: int
    num_draft_tokens: int
    draft_path: str | None = None
    """Directory of the draft, a model or a head; None where there is none."""
    where_it_pays: bool = False
    """Whether it drafts only where passes were measured to give more."""

    @classmethod
    def of(cls, config: SpeculativeConfig, draft_path: str | None) -> SpeculativeSettings:
        """Those of a section of settings."""
        numbers = config.steps, config.topk, config.draft_tokens
        return cls(config.algorithm, *numbers, draft_path, config.when == "auto")

    @property
    def has_draft(self) -> bool:
        """Whether there is a model, or a head, that drafts."""
        return self.draft_path is not None

    @property
    def is_model(self) -> bool:
        """Whether the draft is a model of its own, which reads tokens alone."""
        return self.algorithm == "standalone"

    def server_arguments(self, *, sleeps: bool) -> dict[str, Any]:
        """The fields of `sglang.ServerArgs` that say so.

        `sleeps`: the engine lets go of its weights at times. A sync then brings the policy's, and
        the draft's not always, so that they are kept in host memory meanwhile.
        """
        arguments: dict[str, Any] = {
            "speculative_algorithm": self.algorithm.upper(),
            "speculative_num_draft_tokens": self.num_draft_tokens,
        }
        if self.has_draft:
            arguments |= {
                "speculative_draft_model_path": self.draft_path,
                "speculative_num_steps": self.num_steps,
                "speculative_eagle_topk": self.topk,
                "enable_draft_weights_cpu_backup": sleeps,
            }
        return arguments


class DraftLoader:
    """Loads weights into the draft alone; a `Loader` of `kit.weight_sync.receiver`."""

    def from_memory(
        self, manager: Any, payloads: list[bytes], **common: Any
    ) -> Awaitable[tuple[bool, str]]:
        """See `Loader`."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        request = UpdateWeightsFromTensorReqInput(serialized_named_tensors=payloads, **common)
        answer: Awaitable[tuple[bool, str]] = manager.update_weights_from_tensor(request, None)
        return answer

    def from_broadcast(
        self, manager: Any, group: str, spec: Any, **common: Any
    ) -> Awaitable[tuple[bool, str]]:
        """Refuse: what is broadcast reaches the target only."""
        raise StackError(
            "A draft's weights cannot be broadcast.", fix="set cluster.colocate: true."
        )


def own_of_head(named: dict[str, Any]) -> dict[str, Any]:
    """What an EAGLE head has of its own among SGLang's parameters of it, by its files' names.

    SGLang puts them below `model`, and the policy's embeddings and output beside them.
    """
    own = {name.removeprefix("model."): value for name, value in named.items()}
    return {name: own[name] for name in own if name.startswith(("fc.", "layers."))}


@dataclass(frozen=True, slots=True)
class Passes:
    """What the passes of a response have noted; see `note_pass`."""

    noted: tuple[Note, ...]

    @classmethod
    def of(cls, meta: dict[str, Any], tokens: int) -> Self:
        """Those of a response.

        Args:
            meta: SGLang's `meta_info` of it.
            tokens: of it. The first comes from reading the prompt, without a pass.

        Raises:
            StackError: there were passes, and SGLang does not tell of all of them.
        """
        flat, width = meta.get("spec_correct_drafts_histogram") or [], len(fields(Note))
        count = meta.get("spec_verify_ct")
        missing = count is None if tokens > 1 else False
        if missing or len(flat) != width * (count or 0):
            raise StackError(
                f"The engine drafts, and tells of {len(flat) // width} of the {count} passes that "
                f"wrote {tokens} tokens.",
                why="Nobody would see a draft that no longer helps.",
                fix="install the SGLang version that requirements.lock names.",
            )
        places = range(0, len(flat), width)
        return cls(tuple(Note(*flat[place : place + width]) for place in places))

    def spec_info(self, tokens: int) -> dict[str, int]:
        """See `Sample.spec_info`; `tokens` are those of the response."""
        if not self.noted:
            return {}
        drafts = [note for note in self.noted if note.proposed]
        timed = [note for note in self.noted if note.plain_us]
        return {
            "passes": len(self.noted),
            "verify_ct": len(drafts),
            "num_proposed_drafts": sum(note.proposed for note in drafts),
            "num_correct_drafts": sum(note.correct for note in drafts),
            "tokens": sum(note.end(tokens) - note.first for note in drafts),
            "us": sum(note.us for note in timed),
            "plain_us": sum(note.plain_us for note in timed),
        }

    def drafted(self, tokens: int) -> list[int]:
        """See `Sample.rollout_drafted`; `tokens` are those of the response."""
        places = [0] * tokens
        for note in self.noted:
            end = min(note.first + note.correct, tokens)
            places[note.first : end] = range(1, end - note.first + 1)
        return places


@dataclass(frozen=True, slots=True)
class Note:
    """A pass that verified the drafts of a request, or went without."""

    first: int
    """Place of the first token that it wrote, in the response."""
    correct: int
    """Drafted tokens that it accepted."""
    proposed: int
    """Drafted tokens that it looked at; 0 for a pass without drafts."""
    us: int
    """Microseconds that it took; 0 where that is not known."""
    plain_us: int
    """Microseconds that passes without drafts would take for these tokens; likewise."""

    def end(self, tokens: int) -> int:
        """Place after the last token that it wrote of a response of so many tokens.

        A pass may go on past the end of a response.
        """
        return min(self.first + self.correct + 1, tokens)


# ---- in SGLang's scheduler ---------------------------------------------------------------------


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
    if settings.where_it_pays:
        from kit.engine import draft_choice

        draft_choice.register()


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


def read_without_logits(worker: Any) -> None:
    """Have a draft make no logits where it only reads what was accepted.

    In place of SGLang's `StandaloneDraftWorker.init_lm_head`, which does nothing and is called once
    the draft is there. What it drafts from there comes of a step of its own.

    Args:
        worker: SGLang's, of the draft.
    """
    from sglang.srt.layers.logits_processor import LogitsProcessorOutput

    processor = worker.draft_runner.model.logits_processor
    process = processor.forward

    def leave_out(tokens: Any, hidden: Any, head: Any, metadata: Any, *args: Any, **kw: Any) -> Any:
        if not metadata.forward_mode.is_draft_extend_v2():
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

    That is the last token of before, the root of the tree, and all accepted ones but the last.
    """
    import torch
    from sglang.srt.speculative.eagle_worker_v2 import EagleDraftWorker

    n = worker.speculative_num_draft_tokens
    roots = batch.spec_info.draft_token.view(-1, n)[:, :1]
    accepted = result.next_token_ids.view(-1, n)
    own = torch.cat([roots.to(accepted.dtype), accepted[:, :-1]], dim=1)
    EagleDraftWorker._draft_extend_for_decode(
        worker, batch, replace(result, next_token_ids=own.flatten())
    )
    following = result.next_draft_input
    following.topk_index, following.topk_p = _begin_with(following.bonus_tokens, worker.topk)


def _begin_with(tokens: Any, topk: int) -> tuple[Any, Any]:
    """(tokens, chances), (B, topk), of a draft that begins by reading these tokens, (B)."""
    import torch

    first = tokens.long()[:, None].expand(-1, topk).contiguous()
    return first, torch.ones_like(first, dtype=torch.float32)


def draft_forward(worker: Any, forward_batch: Any) -> Any:
    """Read the last accepted token in every branch, then draft as SGLang does from there.

    What it is given is left as it was: a CUDA graph is captured from several calls.
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
        return EagleDraftWorker.draft_forward(worker, forward_batch)
    finally:
        attention.attn_backends = [first, *others]
        info.topk_index, info.topk_p = began_with
        forward_batch.positions.sub_(1)
