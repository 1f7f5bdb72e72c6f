"""Speculative decoding: what an engine is told of it, and what is changed in SGLang for it.

Whatever the draft, responses are the target's: drafted tokens are accepted where the target would
have written them. A sync of the policy reaches the target alone, one of the draft the draft alone.

A draft that is a model of its own (`standalone`) is called by SGLang like a head on the target's
hidden states, which reads the token after each place, and so never sees the first token of a
prompt. For a model that learned from whole texts that is another text. Here it reads every token in
its own place: a prompt as it is, then the accepted tokens, and each draft begins with the last of
them. That takes a step of the draft more in each round.

Read from SGLang 0.5.16, and changed in its scheduler:
    speculative/eagle_worker_v2.py       EAGLEWorkerV2.update_weights_from_tensor: loads what comes
                                         into draft and target; ours into the draft
                                         EagleDraftWorker.draft_forward, _draft_extend_for_prefill,
                                         _draft_extend_for_decode
    managers/schedule_batch.py           Req.update_finish_state: see `within_limit`
                                         Req.update_spec_correct_drafts_histogram: see `note_pass`;
                                         it is called before the tokens are appended
    speculative/standalone_worker_v2.py  StandaloneDraftWorker; StandaloneWorkerV2, which lacks `ps`
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kit.errors import StackError

if TYPE_CHECKING:
    from kit.config import SpeculativeConfig

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
    """Directory of the draft; None where there is no model."""

    @classmethod
    def of(cls, config: SpeculativeConfig, draft_path: str | None) -> SpeculativeSettings:
        """Those of a section of settings."""
        return cls(config.algorithm, config.steps, config.topk, config.draft_tokens, draft_path)

    @property
    def has_draft(self) -> bool:
        """Whether there is a model that drafts."""
        return self.draft_path is not None

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


def spec_info(meta: dict[str, Any], tokens: int) -> dict[str, int]:
    """What SGLang counted while it wrote a response; see `Sample.spec_info`.

    Args:
        meta: SGLang's `meta_info` of the response.
        tokens: of the response. The first comes from reading the prompt, without a draft.

    Raises:
        StackError: more were written, and SGLang says nothing of them.
    """
    if tokens <= 1 and not meta.get("spec_verify_ct"):
        return {}
    names = ("spec_verify_ct", "spec_num_proposed_drafts", "spec_num_correct_drafts")
    missing = [name for name in names if not isinstance(meta.get(name), int)]
    if missing:
        raise StackError(
            f"The engine drafts, and its answer lacks {missing[0]}.",
            why="Without it nobody would see a draft that no longer helps.",
            fix="install the SGLang version that requirements.lock names.",
        )
    counts = {name.removeprefix("spec_"): int(meta[name]) for name in names}
    return counts | {"tokens": max(tokens - 1, 0)}


def drafted(meta: dict[str, Any], tokens: int) -> list[int]:
    """Where in a draft each token of a response stood; see `Sample.rollout_drafted`.

    Args:
        meta: SGLang's `meta_info` of the response, with what `note_pass` has put there.
        tokens: of the response.

    Raises:
        StackError: passes verified drafts, and not all of them are there.
    """
    places = [0] * tokens
    noted = meta.get("spec_correct_drafts_histogram") or []
    passes = meta.get("spec_verify_ct") or 0
    if len(noted) != 2 * passes:
        raise StackError(
            f"The engine verified drafts in {passes} passes, and noted {len(noted) // 2} of them.",
            why="Nobody could say which tokens were drafted.",
            fix="install the SGLang version that requirements.lock names.",
        )
    for first, correct in zip(noted[::2], noted[1::2], strict=True):
        end = min(first + correct, tokens)  # a pass may go on past the end of a response
        places[first:end] = range(1, end - first + 1)
    return places


# ---- in SGLang's scheduler ---------------------------------------------------------------------


def register(settings: SpeculativeSettings) -> None:
    """Change this process' SGLang as the top of this module says."""
    from sglang.srt.managers.schedule_batch import Req

    request: Any = Req
    if not hasattr(request.update_finish_state, "within_limit"):
        request.update_finish_state = within_limit(request.update_finish_state)
    request.update_spec_correct_drafts_histogram = note_pass
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
    if settings.algorithm == "standalone":
        from sglang.srt.speculative.standalone_worker_v2 import StandaloneDraftWorker

        drafting: Any = StandaloneDraftWorker
        drafting.draft_forward = draft_forward
        drafting._draft_extend_for_prefill = read_prompts
        drafting._draft_extend_for_decode = read_accepted


def note_pass(request: Any, num_correct_drafts: int) -> None:
    """Note where a pass begins to write, and how many drafted tokens it accepts.

    In place of SGLang's histogram, which tells of no place and goes the same way.
    """
    request.spec_correct_drafts_histogram += [len(request.output_ids), num_correct_drafts]


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
