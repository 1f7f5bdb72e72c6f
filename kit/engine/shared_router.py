"""SGLang's choice of experts by a shared operator, on CPUs and GPUs; read from SGLang 0.5.16.

For `training.true_on_policy`: the trainer's routers choose by the same one.
    relies on   layers/moe/topk.py: fused_topk
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from kit.operators.unknown import unknown

Choice = tuple[torch.Tensor, torch.Tensor]
"""Weights of each row's experts, float32, and their numbers; (T, experts of a row) each."""


def fused_topk_by(route: Callable[..., Choice]) -> Callable[..., Choice]:
    """SGLang's `fused_topk` with this operator; see `kit.operators.cpu.route` for what it does."""

    def fused_topk(
        hidden_states: torch.Tensor,
        gating_output: torch.Tensor,
        topk: int,
        renormalize: bool,
        correction_bias: torch.Tensor | None = None,
        scoring_func: str = "softmax",
        **named: Any,
    ) -> Choice:
        if correction_bias is not None or scoring_func != "softmax":
            raise unknown("SGLang weighs its experts by something else than a softmax")
        if any(named.get(key) for key in ("num_fused_shared_experts", "packed_out")):
            raise unknown("SGLang gives every token an expert more")
        weights, chosen = route(gating_output, topk, normalizes=renormalize)
        return weights, chosen.int()

    return fused_topk
