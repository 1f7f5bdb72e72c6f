"""A token of each request, drawn by its own seed and place, in one reading of its logits.

SGLang divides the logits by temperatures, makes probabilities of them, draws, and takes logarithms
of all of them to report one: some fifteen passes over them, a millisecond of a step of 256 requests
with a vocabulary of 150,000 tokens.

What asks for more than a token and its log-prob has SGLang's sampler as before: a part of the
distribution, the log-probs of further tokens, processors of logits of the user's own.

    relies on   layers/sampler.py: Sampler.forward; model_runner.py: ModelRunner.sample, which calls
                it with positions of a batch's last tokens, after penalties and masks
                layers/logprob_processor.py: LogprobResult
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.environ import envs
from sglang.srt.layers.logprob_processor import LogprobResult
from sglang.srt.layers.sampler import Sampler

from kit.engine import sampling
from kit.engine.gpu import drawing, logits


def drawing_by_seed(forward: Any) -> Any:
    """`Sampler.forward`, which goes on where more is asked for than the kit's kernel gives.

    Args:
        forward: SGLang's.
    """

    def draw(
        self: Any,
        logits_output: Any,
        info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        more = any(top_logprobs_nums or ()) or any(x is not None for x in token_ids_logprobs or ())
        more = return_logprob and (more or envs.SGLANG_RETURN_ORIGINAL_LOGPROB.get())
        more |= info.has_custom_logit_processor or any(info.return_sampling_masks or ())
        if more or not sampling.draws_from_all(info):
            logits.widen(logits_output)
            wanted = top_logprobs_nums, token_ids_logprobs, positions
            drawn: torch.Tensor = forward(self, logits_output, info, return_logprob, *wanted)
            return drawn
        temperatures = None if info.is_all_greedy else info.temperatures
        tokens, log_probs = drawing.draw(
            logits_output.next_token_logits, temperatures, info.sampling_seed, positions
        )
        if return_logprob:
            LogprobResult(token_logprobs=log_probs).write_output_to(logits_output)
        self._sync_token_ids_across_tp(tokens, info)
        return tokens

    return draw


def register() -> None:
    """Have this process' SGLang draw so."""
    sampling.register()
    sampler: Any = Sampler
    sampler.forward = drawing_by_seed(sampler.forward)
