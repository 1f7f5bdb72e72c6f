"""Logits of tokens that are written, in the dtype of the product that makes them.

SGLang copies them to float32: of 256 requests with a vocabulary of 150,000 tokens 78 MB that are
read and 156 MB that are written, to be read again by the kernel that draws. That kernel reads
bfloat16 as well, and has the same numbers from it. So the product is written to where SGLang's
graphs have room for the copy, and what changes logits, or is not the kit's kernel, is given a copy.

    relies on   layers/logits_processor.py: LogitsProcessor._get_logits, and what it looks at;
                LogitsMetadata.next_token_logits_buffer, where a step is a graph
                model_executor/model_runner.py: ModelRunner._preprocess_logits
                sampling/sampling_batch_info.py: SamplingBatchInfo.apply_logits_bias
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, should_apply_lm_head_quant_method
from sglang.srt.model_executor.model_runner import ModelRunner


def is_one_product(processor: Any, lm_head: Any) -> bool:
    """Whether logits are the product with an output layer in bfloat16, and nothing more."""
    weight = getattr(lm_head, "weight", None)
    return (
        isinstance(weight, torch.Tensor)
        and weight.dtype == torch.bfloat16
        and len(weight) == processor.vocab_size
        and not hasattr(lm_head, "set_lora")
        and not should_apply_lm_head_quant_method(lm_head, getattr(lm_head, "quant_method", None))
        and not processor.use_fp32_lm_head
        and processor.logit_scale is None
        and not processor.final_logit_softcapping
        and not processor.do_tensor_parallel_all_gather
        and not processor.do_tensor_parallel_all_gather_dp_attn
        and processor.rl_on_policy_target is None
    )


def written_where_the_copy_was(get: Any) -> Any:
    """`LogitsProcessor._get_logits`, in bfloat16 where a graph decodes.

    Args:
        get: SGLang's.
    """

    def logits(
        self: Any,
        hidden_states: torch.Tensor,
        lm_head: Any,
        logits_metadata: Any,
        embedding_bias: torch.Tensor | None = None,
        use_logits_buffer: bool = True,
    ) -> torch.Tensor:
        room = logits_metadata.next_token_logits_buffer if use_logits_buffer else None
        shape = len(hidden_states), self.vocab_size
        if (
            not logits_metadata.forward_mode.is_decode()
            or embedding_bias is not None
            or room is None
            or (tuple(room.shape), room.dtype) != (shape, torch.float32)
            or hidden_states.dtype != torch.bfloat16
            or not is_one_product(self, lm_head)
        ):
            more = embedding_bias, use_logits_buffer
            copied: torch.Tensor = get(self, hidden_states, lm_head, logits_metadata, *more)
            return copied
        narrow = room.view(torch.bfloat16)[:, : self.vocab_size]
        return torch.mm(hidden_states, lm_head.weight.T, out=narrow)

    return logits


def changes_logits(info: Any) -> bool:
    """Whether there are penalties, biases or grammars."""
    penalties = info.penalizer_orchestrator
    return bool(
        info.acc_additive_penalties is not None
        or info.acc_scaling_penalties is not None
        or (penalties and penalties.is_required)
        or info.grammars
        or info.vocab_mask is not None
        or info.logit_bias is not None
    )


def widened_where_they_change(preprocess: Any) -> Any:
    """`ModelRunner._preprocess_logits`, which changes them in float32.

    Args:
        preprocess: SGLang's.
    """

    def change(self: Any, logits_output: Any, sampling_info: Any) -> None:
        if changes_logits(sampling_info):
            widen(logits_output)
        preprocess(self, logits_output, sampling_info)

    return change


def widen(logits_output: Any) -> None:
    """Give the logits of a step in float32."""
    logits_output.next_token_logits = logits_output.next_token_logits.float()


def register() -> None:
    """Have this process' SGLang do so; what draws has to widen what it does not read itself."""
    processor: Any = LogitsProcessor
    processor._get_logits = written_where_the_copy_was(processor._get_logits)
    runner: Any = ModelRunner
    runner._preprocess_logits = widened_where_they_change(runner._preprocess_logits)
