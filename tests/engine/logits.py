"""Logits that SGLang's processor gives once the kit's change is registered.

Prints what `test_logits` compares.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.model_runner import ModelRunner

from kit.engine.gpu import logits

ROWS, SIZE, VOCABULARY = 5, 16, 40


def processor(**changes: Any) -> Any:
    """SGLang's, without what it reads of a server."""
    own: Any = object.__new__(LogitsProcessor)
    torch.nn.Module.__init__(own)
    plain = {
        "vocab_size": VOCABULARY,
        "use_fp32_lm_head": False,
        "logit_scale": None,
        "final_logit_softcapping": None,
        "do_tensor_parallel_all_gather": False,
        "do_tensor_parallel_all_gather_dp_attn": False,
        "rl_on_policy_target": None,
    }
    for name, value in (plain | changes).items():
        setattr(own, name, value)
    return own


def info(**changes: Any) -> SimpleNamespace:
    """SGLang's sampling parameters, as far as they change logits."""
    plain: dict[str, Any] = {
        "acc_additive_penalties": None,
        "acc_scaling_penalties": None,
        "penalizer_orchestrator": SimpleNamespace(is_required=False),
        "grammars": None,
        "vocab_mask": None,
        "logit_bias": None,
        "update_regex_vocab_mask": lambda: None,
    }
    own = SimpleNamespace(**plain | changes)
    bias = own.logit_bias
    own.apply_logits_bias = lambda logits: None if bias is None else logits.add_(bias)
    return own


def main() -> None:
    """Get logits in each of the ways in which a step may ask for them, and change them."""
    logits.register()
    torch.manual_seed(0)
    hidden = torch.randn(ROWS, SIZE).bfloat16()
    head = SimpleNamespace(weight=torch.randn(VOCABULARY, SIZE).bfloat16())
    plain = hidden @ head.weight.T

    def got(mode: ForwardMode, rows: int = ROWS, **changes: Any) -> torch.Tensor:
        room = torch.zeros(rows, VOCABULARY)
        step = SimpleNamespace(forward_mode=mode, next_token_logits_buffer=room)
        found: torch.Tensor = processor(**changes)._get_logits(hidden, head, step)
        where = found.untyped_storage().data_ptr() == room.data_ptr()
        print(str(found.dtype)[6:], where, torch.equal(found.float(), plain.float()))
        return found

    written = got(ForwardMode.DECODE)
    got(ForwardMode.EXTEND)
    got(ForwardMode.TARGET_VERIFY)
    got(ForwardMode.DECODE, rows=ROWS + 1)
    got(ForwardMode.DECODE, logit_scale=2.0)
    runner: Any = object.__new__(ModelRunner)
    for changes in ({}, {"logit_bias": torch.full((1, VOCABULARY), 1 / 512)}, {"grammars": [1]}):
        output = SimpleNamespace(next_token_logits=written)
        runner._preprocess_logits(output, info(**changes))
        given = output.next_token_logits
        wanted = plain.float() + (1 / 512 if "logit_bias" in changes else 0)
        print(str(given.dtype)[6:], torch.equal(given.float(), wanted))


if __name__ == "__main__":
    main()
