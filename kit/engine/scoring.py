"""Log-probs of given responses, computed again by the engine."""

from __future__ import annotations

import base64
import uuid
from collections.abc import Sequence
from typing import Any

from kit.messages import CacheUse, Rescored


async def rescore(
    sglang: Any,
    tokens: Sequence[Sequence[int]],
    response_lengths: Sequence[int],
    *,
    cache: CacheUse,
    experts: bool = False,
) -> list[Rescored]:
    """Read samples in one go, as prompts, and return what the engine makes of each response token.

    Args:
        sglang: the running `sglang.Engine`.
        tokens: prompt and response of each sample.
        response_lengths: how many of them are the response.
        cache: what is taken from the prefix cache.
        experts: also ask which experts each token went to.
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
            return_routed_experts=experts,
            extra_key=key,
        )
        outputs = await manager.generate_request(request, None).__anext__()
    config = manager.model_config.hf_text_config
    per_layer = getattr(config, "num_experts_per_tok", None) or 1
    shape = (-1, config.num_hidden_layers, per_layer)
    return [
        _rescored(output["meta_info"], len(row), n, shape)
        for output, row, n in zip(outputs, tokens, response_lengths, strict=True)
    ]


def _rescored(
    meta: dict[str, Any], length: int, response_length: int, shape: tuple[int, int, int]
) -> Rescored:
    pairs = meta["input_token_logprobs"]
    log_probs = [float(pair[0]) for pair in pairs[len(pairs) - response_length :]]
    if meta.get("routed_experts") is None:
        return Rescored(log_probs)
    import numpy as np

    flat = np.frombuffer(base64.b64decode(meta["routed_experts"]), dtype=np.int32)
    experts: list[list[list[int]]] = flat.reshape(shape)[: length - 1].tolist()
    return Rescored(log_probs, experts)
