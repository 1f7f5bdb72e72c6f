"""Mixture-of-experts routers: which experts each token takes, and other experts in their place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

Experts = list[list[list[int]]]
"""The experts of a sample's tokens: (tokens, layers, top k)."""


@dataclass(frozen=True, slots=True)
class Routed:
    """Experts and log-probs of one forward pass, sample by sample."""

    experts: list[Experts]
    log_probs: list[list[float]]


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of all layers in their order; empty for a model without experts."""
    return [m for m in model.modules() if type(m).__name__.endswith("Router")]


@contextmanager
def observe_routers(
    routers: list[nn.Module], forced: Experts | None = None
) -> Iterator[list[torch.Tensor]]:
    """Record the experts that each router chooses, (tokens, top k), in the order of the layers.

    Args:
        routers: those of one model.
        forced: experts to send the tokens to instead; tokens at the end that it lacks choose
            themselves.
    """
    seen: list[torch.Tensor] = []

    def observe(module: Any, _inputs: Any, output: Any) -> Any:
        logits, scores, chosen = output
        if forced is not None:
            table = torch.tensor(forced, device=logits.device)[:, len(seen)]
            chosen = logits.topk(table.shape[1], dim=-1).indices
            chosen[: len(table)] = table
            shares = logits.softmax(-1, dtype=torch.float32).gather(-1, chosen)
            if module.norm_topk_prob:
                shares = shares / shares.sum(-1, keepdim=True)
            scores = shares.to(scores.dtype)
        seen.append(chosen.cpu())
        return logits, scores, chosen

    hooks = [router.register_forward_hook(observe) for router in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
