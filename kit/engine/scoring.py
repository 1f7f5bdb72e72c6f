"""Log-probs of given responses, computed again by the engine."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from kit.engine.routing import routed_experts
from kit.messages import CacheUse, Rescored
from kit.models.source import ExpertLayout


async def rescore(
    sglang: Any,
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    cache: CacheUse,
    experts: ExpertLayout | None = None,
    adapter: str | None = None,
) -> list[Rescored]:
    """Read samples in one go, as prompts, and return what the engine makes of each response token.

    Args:
        sglang: the running `sglang.Engine`.
        tokens: prompt and response of each sample.
        response_lengths: how many of them are the response.
        cache: what is taken from the prefix cache.
        experts: the model's, to ask which of them each token went to.
        adapter: SGLang's name for the adapter that reads; None reads with the weights alone.
    """
    from sglang.srt.managers.io_struct import GenerateReqInput

    if not tokens:
        return []
    starts = [max(len(row) - n - 1, 0) for row, n in zip(tokens, response_lengths, strict=True)]
    manager = sglang.tokenizer_manager
    # A prefix is found under its key only, and nobody has used this one.
    key = None if cache == "present" else uuid.uuid4().hex
    for _ in range(2 if cache == "refilled" else 1):
        request = GenerateReqInput(
            input_ids=[list(row) for row in tokens],
            sampling_params={"max_new_tokens": 0, "temperature": 0.0},
            return_logprob=True,
            logprob_start_len=starts,
            return_routed_experts=experts is not None,
            extra_key=key,
            lora_path=adapter and [adapter] * len(tokens),
        )
        outputs = await manager.generate_request(request, None).__anext__()
    return [
        _rescored(output["meta_info"], n, experts)
        for output, n in zip(outputs, response_lengths, strict=True)
    ]


def _rescored(meta: dict[str, Any], response_length: int, layout: ExpertLayout | None) -> Rescored:
    pairs = meta["input_token_logprobs"]
    log_probs = [float(pair[0]) for pair in pairs[len(pairs) - response_length :]]
    return Rescored(log_probs, routed_experts(meta, 0, layout) if layout else None)
