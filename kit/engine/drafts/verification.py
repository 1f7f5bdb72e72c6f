"""Which drafted tokens are accepted, on CPUs and GPUs alike.

Each node of a tree gets a token that is drawn as plain decoding draws it in its place, and a
drafted token is accepted where it is that token. So responses have the distribution of plain
decoding, whatever the draft says; only how many tokens a pass of the model gives depends on it. The
drawing goes by the request's own seed and the place in the sequence, so that responses are those of
plain decoding, token by token, as far as both come to the same logits.

SGLang's kernel for GPUs accepts as much: what is drafted at a place has the sum of its
probabilities.

Read from SGLang 0.5.16:
    speculative/eagle_worker_common.py, ngram_worker.py   eagle_sample: called by both workers
    speculative/eagle_utils.py     verify_tree_greedy_func: follows a tree along given tokens
    speculative/ngram_worker.py    NGRAMWorker.forward_batch_generation: moves what was accepted
    speculative/cpp_ngram/         NgramCorpus: needs a compiler; `kit.engine.drafts.ngram` does not
"""

from __future__ import annotations

from typing import Any

import torch

from kit.engine.sampling import draws_from_all


def wanted_tokens(
    logits: torch.Tensor, info: Any, nodes: int, positions: torch.Tensor
) -> torch.Tensor:
    """The token that plain decoding would write after each node, (B * n).

    Args:
        logits: of the target after each node, (B * n, vocabulary).
        info: SGLang's sampling parameters of the B requests.
        nodes: n.
        positions: of the nodes, by which the drawing goes, (B * n).
    """
    from sglang.srt.layers import sampler

    if info.is_all_greedy:
        return logits.argmax(-1)

    def by_node(of_requests: Any) -> Any:
        return of_requests.repeat_interleave(nodes, dim=0)

    probabilities = torch.softmax(logits / by_node(info.temperatures), dim=-1)
    seeds = None if info.sampling_seed is None else by_node(info.sampling_seed)
    if info.need_top_p_sampling or info.need_top_k_sampling or info.need_min_p_sampling:
        drawn = sampler.top_k_top_p_min_p_sampling_from_probs_torch(
            probabilities,
            by_node(info.top_ks),
            by_node(info.top_ps),
            by_node(info.min_ps),
            info.need_min_p_sampling,
            seeds,
            positions,
        )
    else:
        drawn = sampler.sampling_from_probs_torch(
            probabilities, sampling_seed=seeds, positions=positions
        )
    tokens: torch.Tensor = drawn.long().view(-1)
    return tokens


def with_known_log_probs(compute: Any) -> Any:
    """Take the log-probs that came with the tokens, where they did.

    Args:
        compute: SGLang's `compute_spec_v2_logprobs`, which makes them of all logits.
    """
    from sglang.srt.environ import envs

    def log_probs(batch: Any, output: Any, tokens: Any, accepted: Any, steps: int) -> None:
        known = getattr(output, "node_log_probs", None)
        more = [*(batch.top_logprobs_nums or []), *(batch.token_ids_logprobs or [])]
        if known is None or any(more) or envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get():
            compute(batch, output, tokens, accepted, steps)
        else:
            # Places past the last accepted token are -1, and nobody reads what stands there.
            output.next_token_logprobs = known[accepted.long()]

    return log_probs


def accept(
    verify_input: Any, batch: Any, logits_output: Any, vocab_mask: Any = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """In place of SGLang's `eagle_sample`, whose arguments and results these are.

    Raises:
        RuntimeError: there is a penalty, a bias of logits or a grammar: the kit asks for none.
    """
    from sglang.srt.speculative.eagle_utils import verify_tree_greedy_func

    info, n = batch.sampling_info, verify_input.draft_token_num
    others = (info.acc_additive_penalties, info.acc_scaling_penalties, info.logit_bias, vocab_mask)
    if any(other is not None for other in others):
        raise RuntimeError("drafts are not verified with penalties, biases or grammars")
    count = len(batch.seq_lens)
    logits = logits_output.next_token_logits
    positions = verify_input.positions[: count * n]
    if logits.is_cuda and draws_from_all(info):
        from kit.engine.gpu import drawing

        temperatures = None if info.is_all_greedy else info.temperatures
        wanted, logits_output.node_log_probs = drawing.draw(
            logits, temperatures, info.sampling_seed, positions, n
        )
    else:
        wanted = wanted_tokens(logits, info, n, positions)
    whole = {"dtype": torch.int32, "device": logits.device}
    predicted = torch.zeros(count * n, **whole)
    accepted = torch.full((count, verify_input.max_tree_depth), -1, **whole)
    correct = torch.zeros(count, **whole)
    verify_tree_greedy_func(
        predicted,
        accepted,
        correct,
        verify_input.draft_token.view(count, n),
        verify_input.retrieve_index,
        verify_input.retrieve_next_token,
        verify_input.retrieve_next_sibling,
        wanted.view(count, n),
    )
    return predicted, correct + 1, accepted


def register() -> None:
    """Have this process' SGLang verify so, and draft n-grams without a compiler."""
    from sglang.srt.speculative import eagle_worker_common, ngram_worker

    from kit.engine.drafts.ngram import NgramCorpus

    common: Any = eagle_worker_common
    common.eagle_sample = accept
    common.compute_spec_v2_logprobs = with_known_log_probs(common.compute_spec_v2_logprobs)
    ngram: Any = ngram_worker
    ngram.eagle_sample = accept
    ngram.compute_spec_v2_logprobs = common.compute_spec_v2_logprobs
    ngram_worker.NgramCorpus = NgramCorpus
    # Accepted tokens of a chain are where they belong. SGLang copies them there nonetheless, and
    # compiles the copying anew for so and so many of them.
    ngram.move_accept_tokens_to_target_kvcache = lambda *_: None
